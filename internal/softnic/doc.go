// Package softnic is the software NIC: a RoCE NIC in user space.
//
// A NIC belongs to one open context and has a GID of its own. Two NICs talk over a link: within a process, or between
// processes of one uid on one host through shared memory. Over both, an operation is executed by the initiator's CPU as
// a memory operation (a direct path): a SEND copies straight into the receive buffer that the peer posted and writes the
// peer's completion; READ, WRITE and atomics touch the peer's region; no thread of the peer is involved and no system call
// is made, unless the peer sleeps and must be woken.
//
// To other hosts, and to whatever else speaks RoCEv2, a NIC sends packets (netPort, wireQP; packages wire and udp below this one).
//
// # What is shared
//
// Each side of a link owns chunks of memory that the other side maps too: for every connected QP a block (layout.go) with
// the receives it has posted and the completions that the peer writes, and for every CQ a port (layout.go) to wake its
// sleeper. Memory regions are memfds of their own, mapped by the peer at first use. Between processes all of it is passed
// as sealed memfds over a Unix socket in the abstract namespace, so nothing is left behind in a file system when a
// process dies; the socket's end of file is also how a peer's death is noticed.
//
// # Trust
//
// The owner of a block never reads back what it wrote there: it keeps private copies. What the peer writes (completions,
// hazard words, control messages) is checked against those copies, and anything impossible closes the link with a reason
// (Link.fault). Regions are only reachable through a handle that is live in the owner's table, which peers map read-only.
//
// # Revocation without a fence on the data path
//
// Before an initiator looks whether a region or a QP is still valid it raises the busy word of its QP's block, and lowers
// it after the copy, with release stores. Whoever takes something away first invalidates it, then issues a barrier on
// every core that runs a registered process (membarrier(2), GLOBAL_EXPEDITED), then waits for raised busy words. The cost
// is on the side that is slow anyway. The same barrier lets a sender look for a sleeping receiver with a plain load.
package softnic
