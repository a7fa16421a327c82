// SPDX-License-Identifier: GPL-2.0-or-later
// Of one scope: which of its processes live in which address space, and what
// each space maps. A space lives as long as a process of it does.
#pragma once

#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.hpp"

namespace hypertier {

struct Process {
  __u64 space = 0;
  __u64 cgroup_id = 0;
  std::string comm;
};

struct Space {
  std::vector<__u32> pids;
  std::vector<ht_mapping> mappings;  // all, sorted; neighbours of a kind joined
  __u64 seq = 0;                     // change stamp of mappings
  __u64 born_epoch = 0;              // after which it was seen first
  __u64 rss_pages = HT_UNKNOWN64;
  __u64 rss_epoch = 0;     // of that
  __u64 grown_pages = 0;  // an epoch, from the poll before to the last one
  __u64 polled_epoch = 0;
  __u64 changed_epoch = 0;  // its mappings or its size differed from the poll before
  __u64 urgent_epoch = 0;  // is in urgent_ since
};

class Spaces {
 public:
  // What a poll found. mapped: all that is to be managed now.
  class Watcher {
   public:
    virtual ~Watcher() = default;
    virtual void mapped(__u64 space, std::span<const ht_mapping> managed) = 0;
    virtual void unmapped(__u64 space, __u64 start, __u64 end) = 0;
    virtual void gone(__u64 space) = 0;
    // A process that no event told of: it has another space by now; 0: it is gone.
    virtual void found(__u32 pid, __u64 space) = 0;
  };
  struct Polled {
    __u64 spaces = 0;
    __u64 mappings = 0;
  };

  explicit Spaces(const EngineSettings& settings) : settings_(settings) {}

  void event(const ht_space_event& event);

  // The next poll includes this space: it has samples, or an answer about it
  // did not fit what is known.
  void urgent(__u64 space);

  // Reads the change stamps of urgent spaces and of a rotating share of the
  // others (or of all), the mappings of those that changed, and tells the watcher.
  [[nodiscard]] Result<Polled> poll(__u64 epoch, bool all, Machine& machine, Watcher& watcher);

  // All of a space that is to be managed, as mapped() tells it.
  std::vector<ht_mapping> managed(const Space& space) const;
  Stray stray(__u64 space, __u64 address) const;
  __u32 pid_of(__u64 space) const;  // one of them; 0: none
  const std::map<__u64, Space>& spaces() const { return spaces_; }
  const std::map<__u32, Process>& processes() const { return processes_; }

 private:
  void bind(__u32 pid, __u64 space);
  void leave(__u32 pid, __u64 space);
  Result<> ask(std::vector<ht_space_req>& wanted, Machine& machine, Watcher& watcher, Polled& polled);
  void answer(const ht_space_req& asked, const ht_space_req& got, Machine& machine, Watcher& watcher,
              Polled& polled);
  bool managed(const ht_mapping& mapping) const;

  const EngineSettings& settings_;
  __u64 epoch_ = 0;
  std::map<__u64, Space> spaces_;
  std::map<__u32, Process> processes_;
  std::vector<__u64> urgent_;
  std::vector<__u32> unplaced_;  // processes whose space is not known yet
  std::vector<__u64> gone_;      // spaces without a process, to be told at the next poll
  __u64 rotation_ = 0;           // last space that the rotation polled
};

}  // namespace hypertier
