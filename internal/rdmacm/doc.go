// Package rdmacm speaks with the kernel's connection manager, /dev/infiniband/rdma_cm: it turns IP addresses into RDMA
// devices and routes, and exchanges queue pair numbers, sequence numbers and a little private data with a peer, over the
// CM messages of InfiniBand and RoCE or over iWARP's MPA. It knows nothing of verbs: queue pairs are numbers here, and
// what has to be done to them comes back as ib.QPAttr.
//
// A Channel is one open file, with one goroutine that hands the kernel's events out. An ID is one end of a connection, or
// a listener. Everything that waits takes a context.
//
// # Active side
//
//	id, err := ch.NewID(rdmacm.TCP)
//	err = id.ResolveAddr(ctx, netip.AddrPort{}, peer) // the device is known now: id.QueryAddr
//	err = id.ResolveRoute(ctx)
//	// Make a QP on that device, InitQPAttr(ib.Init), modify it, post receives.
//	reply, err := id.Connect(ctx, params)
//	if !reply.Established { // InfiniBand and RoCE
//		// InitQPAttr and modify for Init (again: only now it carries the access rights), RTR, RTS.
//		err = id.Establish()
//	}
//	<-id.Done() // id.Err says why: move the QP to Err
//
// On iWARP the kernel has moved the QP to RTS when Connect returns, and the first message has to come from this side.
//
// # Passive side
//
//	l, err := id.Listen(backlog) // after id.Bind
//	req, err := l.Accept(ctx)
//	// Make a QP on the device that req.QueryAddr names; InitQPAttr and modify for Init, RTR, RTS; post receives.
//	err = req.Accept(ctx, params) // or req.Reject(why)
//
// # Which device
//
// The kernel chooses the device by the local address: the RDMA device on the net device that has the address. Where several
// stand on one net device (rxe and siw, say), it takes the one that was made first, for listeners as well as for the active
// side, and it cannot be told otherwise. QueryAddr says which it took. A listener on a wildcard address listens on all
// devices, and each request has its own.
//
// The loopback addresses are of no use: they are resolved to some device, but have no route over RoCE. Take an interface's
// own address, also between two processes of one host.
package rdmacm
