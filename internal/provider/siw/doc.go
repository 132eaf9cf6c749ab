// Package siw drives the kernel's software iWARP devices: work requests are written into queues that the process and the
// kernel's driver share, and a system call tells the driver to look. Queue pairs are connected by the connection manager only.
//
// The queues, the layout of their elements and the rules of both sides are the kernel's (rdma/siw-abi.h,
// drivers/infiniband/sw/siw). There are no indices in them: a slot belongs to the kernel while its flag VALID is set, or, in a
// completion queue, to the process. What the kernel does otherwise than package driver promises is made good here:
//
//   - A send or receive slot is free again when the kernel has copied it, long before its completion. An account of its own
//     keeps each queue at its depth until completions are polled, so that a completion queue that is large enough for its
//     queues' depths is not overrun by somebody who posts until there is no room (ledger).
//   - A request that follows a READ completes before it. Completions are handed out in the order of posting.
//   - What is posted to a queue pair in the error state stays in its queue. It is flushed here.
//   - READs beyond those that may be in flight, and fences, on both sides at once make both wait for ever. They are held back here
//     (hold).
//   - The state cannot be asked for (before Linux 6.8), and a queue pair with a failed request may stay in another than Err.
//     The first sign of failure moves it there.
//   - Elements without bytes make the kernel stumble, READs without bytes are answered with others, and long messages that are
//     not signaled are sent from memory that their sender may have changed by then (qp.put, putSGEs).
//
// What cannot be made good: the rights of a queue pair are not looked at, and neither is a region's right to be read by peers. A READ
// of a few bytes (up to some 40) that crosses a page of the target's memory is answered with wrong ones (siw_try_1seg).
package siw
