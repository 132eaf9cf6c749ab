// Package transport carries messages and one-sided operations between two peers, over reliable queue pairs of any
// device.
//
// Peers meet on a TCP address ([Listen], [Dial]), tell each other what their queue pairs need, and then talk through
// those; the TCP connection stays as a sign of life. docs/protocol.md specifies both. The queue pairs are connected by the numbers that were
// told; by the system's connection manager (rdma_cm) on devices that know no other way only (ib.CapCMOnly: iWARP). Whoever wants
// connections by it elsewhere uses [qp.Listen] and [qp.QP.Dial].
//
//	l, err := transport.Listen(ctx, "127.0.0.1:7000", nil)    c, err := transport.Dial(ctx, "127.0.0.1:7000", nil)
//	c, err := l.Accept(ctx)                                   err = c.Send(ctx, []byte("hello"))
//	err = c.Recv(ctx, func(m *transport.Message) error {      ...
//		fmt.Printf("%s\n", m.Bytes())                          err = c.Close()
//		return nil
//	})
//
// # Messages
//
// A [Conn] carries messages both ways, in order. Up to [Conn.EagerSize] a message is copied into the peer's receive slot
// by one SEND; longer ones stay where they are until the peer has read them (rendezvous). Credits make sure that a
// receive is always posted, so that neither side can overrun the other, and a sender waits while the receiver does not consume.
// Marshalling straight into the outgoing memory ([Conn.Alloc], [Conn.Post]) saves the copy that [Conn.Send] makes. Received
// messages are lent for the length of a callback, or taken.
//
// # Progress
//
// There is no engine thread. A [Poller] owns the completion queue of any number of connections, and whoever waits for
// something drives it: see [Poller]. A program can wait for operations of its own with [Poller.Wait] and a [Waiter].
// In steady state nothing here allocates, and nothing makes a system call unless somebody sleeps.
//
// # One-sided operations
//
// [Conn.Grant] lets the peer read, write, or do atomics on a piece of memory, until [Grant.Revoke]; the peer does so with
// [Conn.Read], [Conn.Write] and so on, or several at once with a [Batch]. What was not granted is refused by the device,
// and ends the connection.
//
// # The end
//
// A context that ends stops the waiting, and not the device: calls return only when memory that was lent to them is not touched
// any more. [Conn.Err] says why a connection has ended; every operation in progress ends with it. Every Conn is to be
// closed, also one that has ended by itself.
package transport
