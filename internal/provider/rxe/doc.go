// Package rxe drives the kernel's software RoCE devices: work requests are written into queues that the process and the
// kernel's driver share, and a system call tells the driver to look.
//
// The queues, the layout of their elements and the rules of both sides are the kernel's (rdma/rdma_user_rxe.h,
// drivers/infiniband/sw/rxe).
package rxe
