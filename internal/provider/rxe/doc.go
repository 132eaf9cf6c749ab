// Package rxe drives the kernel's software RoCE devices: work requests are written into queues that the process and the
// kernel's driver share, and a system call tells the driver to look.
//
// The queues, the layout of their elements and the rules of both sides are the kernel's (rdma/rdma_user_rxe.h,
// drivers/infiniband/sw/rxe).
//
// An atomic that is posted behind SENDs or WRITEs which have not completed may itself complete, with success, without its result, if
// packets are lost or late and the peer is an rxe, too (seen in 6.1): that answers a WRITE which comes again by acknowledging what it has
// executed, the atomic included (duplicate_request), and the sender takes this for the atomic's answer (check_ack). The atomic was
// executed, once. Who needs the result posts atomics when nothing but READs and atomics is outstanding.
//
// A RetryCount of 7, the default, has no end in the driver: only with 6 or less is a peer given up that has vanished while the own port
// is active. Of a port that is down, or has lost its address, requests that are on their way are flushed within a few seconds
// (port_linux.go); the driver would keep them.
//
// FLUSH and ATOMIC_WRITE are in Linux 6.2 and newer. The driver forgets the address of both when it sends a request again (seen in
// 6.12, req_retry), so that after a loss on the way the peer may refuse it. A FLUSH for persistence needs persistent memory
// (pmem): other memory cannot be registered with ib.AccessFlushPersistent, which is EINVAL.
package rxe
