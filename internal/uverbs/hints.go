package uverbs

import (
	"strings"
	"syscall"
)

// What to do about a command that the kernel refused, where who asked knows nothing better (CmdError.Hint). An errno has many causes, most
// of which the kernel tells nobody: where there can be several, a hint asks.

// hint is what to do, or empty for an errno that is not known of any command.
func hint(device, op string, errno syscall.Errno) string {
	of := hints[errno]
	text, ok := of[op]
	if !ok {
		if text, ok = of[kindOf(op)]; !ok {
			text = of[anyOp]
		}
	}
	if !strings.Contains(text, limitsHere) {
		return text
	}
	show := "`ringside devices -v " + device + "` shows them"
	if names := limits[op]; names != "" {
		show += ": " + names
	}
	return strings.ReplaceAll(text, limitsHere, show)
}

// Kinds of commands, beside which there are the single ones.
const (
	makes = "create_*"  // an object
	ends  = "destroy_*" // one
	anyOp = ""
)

func kindOf(op string) string {
	switch verb, _, _ := strings.Cut(op, "_"); verb {
	case "create", "alloc", "reg":
		return makes
	case "destroy", "dealloc", "dereg", "free":
		return ends
	}
	return anyOp
}

// limits are the device's that a command can run into, as `ringside devices -v` names them.
var limits = map[string]string{
	"alloc_pd":   "max_pd",
	"reg_mr":     "max_mr, max_mr_size_bytes",
	"alloc_mw":   "max_mw",
	"create_cq":  "max_cq, max_cqe",
	"resize_cq":  "max_cqe",
	"modify_cq":  "max_moderate_count, max_moderate_period_us",
	"create_qp":  "max_qp, max_qp_wr, max_sge, max_inline_bytes",
	"modify_qp":  "max_qp_rd_atom, max_qp_init_rd_atom",
	"create_srq": "max_srq, max_srq_wr, max_srq_sge",
	"modify_srq": "max_srq_wr",
	"create_ah":  "max_ah",
}

const (
	limitsHere = "{limits}" // where they are shown, in a hint

	// Of an object that is unknown kernels say EINVAL, ENOENT or EBADF.
	wasClosed = "was the object, or one that it refers to, closed meanwhile?"

	cannot = "this kernel's driver of the device cannot do it, or not with these values: `ringside devices -v` shows the device's " +
		"capabilities, and a newer kernel's driver may have more"
	contended     = "is another command changing or destroying the object, or one that it refers to, at the same time?"
	shortOfMemory = "is the system, or this process's memory cgroup, short of memory?"
	wasRemoved    = "the device was removed, or its driver has given it up: close what was made of it, and open it again when it is back"
	isMissing     = "was the device, or its net device, removed? `ringside devices` shows what there is"
	lockLimit     = "is the limit on locked memory 0 (ulimit -l)? Raise it, or give this process CAP_IPC_LOCK"
	otherVersion  = "does this kernel's driver want more of a command, or of room for its answer, than ringside gives? Update the older of the two"
)

// hints are by errno, and then by command or kind.
var hints = map[syscall.Errno]map[string]string{
	syscall.EINVAL: {
		makes: "is a value beyond the device's limits, or is this one object too many for it? {limits}. Or " + wasClosed,
		"reg_mr": "is the memory empty, too much of it, or one region too many for the device? {limits}. Or may peers write to it without " +
			"ib.AccessLocalWrite, or does the device not know one of the access flags?",
		"resize_cq": "is that beyond the device's limits? {limits}. Or are more completions waiting to be polled than it is to have entries?",
		"modify_cq": "is that beyond the device's limits? {limits}",
		"modify_qp": "is the state out of order (RESET, INIT, RTR, RTS), an attribute missing that it needs, or one given that it does not take? " +
			"Or is a value beyond the port's path MTU, or the device's limits? {limits}",
		"modify_srq":  "is the limit more than the queue's capacity?",
		"post_send":   "is the queue pair in RTS?",
		"query_port":  "is there a port of that number?",
		"get_context": "does the device's driver speak another version of its interface? Update the older of ringside and the kernel",
		ends:          "was it destroyed before, or does something still refer to it, as a memory window to its region?",
		anyOp:         wasClosed,
	},
	syscall.ENOMEM: {
		makes: shortOfMemory + " Is the limit on locked memory too low for the queues (ulimit -l; drivers of hardware pin them), or is the device " +
			"full? {limits}",
		"resize_cq": shortOfMemory + " Or is the limit on locked memory too low for the queue (ulimit -l; drivers of hardware pin it)?",
		"reg_mr":    shortOfMemory + " Is the limit on locked memory too low (ulimit -l), or is the device full? {limits}",
		anyOp:       shortOfMemory,
	},
	syscall.EAGAIN: {
		makes: "has this process's control group as many RDMA objects as it may (hca_object in its rdma.max), or the device no room for more? " +
			"Destroy what is not needed, or raise the limit",
		"get_context": "has this process's control group as many RDMA devices open as it may (hca_handle in its rdma.max)?",
		anyOp:         "is the device out of resources? Destroy what is not needed, and try again",
	},
	syscall.EBUSY: {
		"dealloc_pd": "something in the protection domain is in use: first destroy its queue pairs, shared receive queues, address handles, " +
			"memory windows and memory regions",
		"destroy_cq":  "the completion queue is in use: first destroy the queue pairs that complete to it",
		"destroy_srq": "the shared receive queue is in use: first destroy the queue pairs that receive from it",
		"destroy_qp":  "the queue pair is in use: first destroy its flow rules, and take it out of its multicast groups",
		"dereg_mr":    "is a memory window bound to the region, or another command at work on it? First free or invalidate the windows",
		ends:          "it is in use, if only by another command at the same time: first destroy what refers to it",
		makes:         "is what it refers to being destroyed at the same time, or are all of the device's numbers for such objects taken?",
		anyOp:         contended,
	},
	syscall.EFAULT: {
		"reg_mr": "is all of the memory mapped and readable, and writable if the device may write to it (ib.AccessLocalWrite)? Mappings of other " +
			"devices' memory cannot be registered (a dma-buf can), nor, with newer kernels, shared writable mappings of files on disks",
		anyOp: "the kernel could not reach the memory of the command, or of a queue: has something unmapped memory that it did not map?",
	},
	syscall.EPERM: {
		"reg_mr":      lockLimit,
		"create_qp":   "does a queue pair of that type need CAP_NET_RAW? Or " + lockLimit,
		"create_flow": "flow rules need CAP_NET_RAW",
		"modify_qp":   "does the Q_Key have its highest bit set? Such ones need CAP_NET_RAW",
		makes:         lockLimit,
		anyOp:         "does it need a capability that this process does not have (CAP_NET_RAW, CAP_IPC_LOCK)?",
	},
	syscall.EACCES: {
		anyOp: "has this process changed its user, group or capabilities since it opened the device? Open it afterwards. Or does a security " +
			"module, such as SELinux, forbid it? The kernel's audit log says so (dmesg)",
	},
	syscall.ENOSPC: {
		"create_flow": "is the device's table of flow rules full? Destroy those that are not needed",
		anyOp:         otherVersion,
	},
	syscall.EBADF: {
		"reg_mr": "is the file descriptor that of a dma-buf?",
		anyOp:    wasClosed,
	},
	syscall.ENOTCONN:        {anyOp: "is the queue pair connected? It has to be in RTS"},
	syscall.ENOENT:          {anyOp: wasClosed},
	syscall.EOPNOTSUPP:      {anyOp: cannot},
	syscall.ENOSYS:          {anyOp: cannot},
	syscall.EPROTONOSUPPORT: {anyOp: cannot},
	syscall.ENOTTY:          {anyOp: cannot},
	syscall.ETIMEDOUT:       {anyOp: "has the device's firmware stopped answering? The kernel's log may say why (dmesg)"},
	syscall.EIO:             {anyOp: wasRemoved},
	syscall.ENODEV:          {anyOp: isMissing},
	syscall.ENXIO:           {anyOp: isMissing},
	syscall.EMFILE:          {anyOp: "this process has as many files open as it may: raise its limit (ulimit -n)"},
	syscall.ENFILE:          {anyOp: "the system has as many files open as it may: raise fs.file-max (sysctl)"},
}
