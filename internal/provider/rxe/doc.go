// Package rxe drives the kernel's software RoCE devices: work requests are written into queues that the process and the
// kernel's driver share, and a system call tells the driver to look.
//
// The queues, the layout of their elements and the rules of both sides are the kernel's (rdma/rdma_user_rxe.h,
// drivers/infiniband/sw/rxe).
//
// FLUSH and ATOMIC_WRITE are in Linux 6.2 and newer. The driver forgets the address of both when it sends a request again (seen in
// 6.12, req_retry), so that after a loss on the way the peer may refuse it. A FLUSH for persistence needs persistent memory
// (pmem): other memory cannot be registered with ib.AccessFlushPersistent, which is EINVAL.
package rxe
