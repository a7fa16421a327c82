// SPDX-License-Identifier: GPL-2.0-only
/*
 * hypertier.ko: the mechanism of HyperTier's guest side. This file: loading,
 * and /dev/hypertier, which tierd keeps open as long as it lives.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/smp.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include "module.h"

#define RESTORES_MAX 16

/* Held by every ioctl, open and the restoring work: they share the state below. */
static DEFINE_MUTEX(device_mutex);
static bool device_open;
static struct {
	struct file *file;
	u32 length;
	char value[sizeof_field(struct ht_restore, value)];
} restores[RESTORES_MAX];
static unsigned int nr_restores;

/* Written under device_mutex, read by walks and moves without: each byte stands alone. */
static u64 tier_nodes[HT_TIERS];
static u8 node_tier[MAX_NUMNODES];

u8 ht_tier_of(int nid)
{
	return READ_ONCE(node_tier[nid]);
}

u64 ht_tier_nodes(enum ht_tier tier)
{
	return READ_ONCE(tier_nodes[tier]);
}

bool ht_device_is_open(void)
{
	return READ_ONCE(device_open);
}

static void forget_restores(void)
{
	lockdep_assert_held(&device_mutex);
	while (nr_restores)
		fput(restores[--nr_restores].file);
}

/*
 * In a worker, not in release(): a task that was killed runs release() with
 * no fs left and, maybe, without the rights that the files ask for.
 */
static void carry_out_restores(struct work_struct *work)
{
	unsigned int i;

	mutex_lock(&device_mutex);
	for (i = 0; i < nr_restores; i++) {
		loff_t position = 0;
		ssize_t written = kernel_write(restores[i].file, restores[i].value,
					       restores[i].length, &position);

		if (written < 0)
			pr_warn("cannot restore %pD: error %zd\n", restores[i].file, written);
	}
	forget_restores();
	mutex_unlock(&device_mutex);
}
static DECLARE_WORK(restore_work, carry_out_restores);

static int hypertier_open(struct inode *inode, struct file *file)
{
	int err = 0;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	/* The next tierd must read what the last one's restores have written. */
	flush_work(&restore_work);
	mutex_lock(&device_mutex);
	if (device_open)
		err = -EBUSY;
	else
		WRITE_ONCE(device_open, true);
	mutex_unlock(&device_mutex);
	return err ?: nonseekable_open(inode, file);
}

static int hypertier_release(struct inode *inode, struct file *file)
{
	mutex_lock(&device_mutex);
	WRITE_ONCE(device_open, false);
	mutex_unlock(&device_mutex);
	schedule_work(&restore_work);
	return 0;
}

static int get_info(struct ht_module_info __user *user)
{
	struct ht_module_info info = {
		.abi = HT_ABI,
		.movers = ht_movers & ~HT_SPLITS,
		.seats = ht_seats(),
	};

	strscpy(info.missing, ht_missing, sizeof(info.missing));
	return copy_to_user(user, &info, sizeof(info)) ? -EFAULT : 0;
}

static int set_tiers(const struct ht_tiers __user *user)
{
	struct ht_tiers tiers;
	int nid, tier;

	if (copy_from_user(&tiers, user, sizeof(tiers)))
		return -EFAULT;
	if (tiers.nodes[HT_TIER_FAST] & tiers.nodes[HT_TIER_SLOW])
		return -EINVAL;
	for (nid = 0; nid < 64; nid++) {
		bool named = (tiers.nodes[HT_TIER_FAST] | tiers.nodes[HT_TIER_SLOW]) >> nid & 1;

		if (named && (nid >= MAX_NUMNODES || !node_state(nid, N_MEMORY)))
			return -ENODEV;
	}
	for (tier = 0; tier < HT_TIERS; tier++)
		WRITE_ONCE(tier_nodes[tier], tiers.nodes[tier]);
	for (nid = 0; nid < min(64, MAX_NUMNODES); nid++)
		WRITE_ONCE(node_tier[nid], tiers.nodes[HT_TIER_FAST] >> nid & 1 ? HT_TIER_FAST :
					   tiers.nodes[HT_TIER_SLOW] >> nid & 1 ? HT_TIER_SLOW :
										  HT_TIER_NONE);
	return 0;
}

static int add_restore(const struct ht_restore __user *user)
{
	struct ht_restore restore;
	struct file *file;

	if (copy_from_user(&restore, user, sizeof(restore)))
		return -EFAULT;
	if (!restore.length || restore.length > sizeof(restore.value))
		return -EINVAL;
	if (nr_restores == RESTORES_MAX)
		return -ENOSPC;
	file = fget(restore.fd);
	if (!file)
		return -EBADF;
	/* The device itself would never be released while it holds itself. */
	if (!(file->f_mode & FMODE_WRITE) || file->f_op->owner == THIS_MODULE) {
		fput(file);
		return -EBADF;
	}
	restores[nr_restores].file = file;
	restores[nr_restores].length = restore.length;
	memcpy(restores[nr_restores].value, restore.value, restore.length);
	nr_restores++;
	return 0;
}

static long hypertier_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	void __user *user = (void __user *)argument;
	long err = 0;

	if (command == HT_IOC_SETTLE) {
		/*
		 * An IPI is served with interrupts on: on each CPU the handler that ran
		 * when it was sent has ended by then. Unlike a grace period of RCU this
		 * does not wait for a policy in its callback.
		 */
		kick_all_cpus_sync();
		return 0;
	}
	/* Seats have their own locks. */
	if (command == HT_IOC_SEAT || command == HT_IOC_EJECT)
		return ht_ask_seat(user, command == HT_IOC_EJECT);
	mutex_lock(&device_mutex);
	switch (command) {
	case HT_IOC_INFO:
		err = get_info(user);
		break;
	case HT_IOC_TIERS:
		err = set_tiers(user);
		break;
	case HT_IOC_RESTORE:
		err = add_restore(user);
		break;
	case HT_IOC_FORGET:
		forget_restores();
		break;
	default:
		err = -ENOTTY;
	}
	mutex_unlock(&device_mutex);
	return err;
}

static const struct file_operations hypertier_fops = {
	.owner = THIS_MODULE,
	.open = hypertier_open,
	.release = hypertier_release,
	.unlocked_ioctl = hypertier_ioctl,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "hypertier",
	.fops = &hypertier_fops,
	.mode = 0600,
};

static int __init hypertier_init(void)
{
	int err;

	memset(node_tier, HT_TIER_NONE, sizeof(node_tier));
	ht_resolve_symbols();
	err = ht_policy_init();
	if (err) {
		pr_err("not loaded: this kernel refuses the policy type or the kfuncs (error %d); they need CONFIG_DEBUG_INFO_BTF_MODULES and the module's own BTF\n",
		       err);
		return err;
	}
	err = misc_register(&device);
	if (err) {
		pr_err("not loaded: cannot make %s (error %d)\n", HT_DEVICE, err);
		return err;
	}
	ht_collapse_init();
	return 0;
}

/*
 * The struct_ops type and the kfuncs have no unregistration: their users hold
 * the module, and both go with its BTF.
 */
static void __exit hypertier_exit(void)
{
	misc_deregister(&device);
	ht_collapse_exit();
	flush_work(&restore_work);
	ht_move_exit();
}

module_init(hypertier_init);
module_exit(hypertier_exit);

MODULE_DESCRIPTION("HyperTier: policies, residency and exchange of pages between memory tiers");
MODULE_VERSION(HT_VERSION);
MODULE_LICENSE("GPL");
