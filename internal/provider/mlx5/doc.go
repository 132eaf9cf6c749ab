// Package mlx5 drives ConnectX NICs (ConnectX-4 and later) and the network side of BlueField: requests are written to queues that
// the NIC reads by itself, and it is told of them by writes to its registers, without the kernel.
//
// The formats are those that the kernel's driver and libmlx5 agree on. It is written against these, compared with what libmlx5
// writes, byte for byte, and tested with a NIC that the tests play; it was never run on hardware.
//
// What the device says is checked before it is used. A completion that names no queue pair of the context, or none of this
// completion queue, or a request that is not outstanding, or that has an opcode or a format that nobody asked for, ends its
// completion queue: Poll returns -1, and Err is ErrDevice with what was wrong. A syndrome that is not known is no such thing: the
// request has failed, with ib.WCGeneralErr, and ib.WC.VendorErr has the syndrome.
//
// Left out: receive data in completions, and compressed ones (both are off unless asked for), completions of 128 bytes, signatures,
// XRC and DC, and of raw Ethernet segmentation, VLAN tags, RSS and flow tags. A receive of a shared queue that ends because its memory was not there in time (on-demand paging) is an
// error, where libmlx5 posts it again.
package mlx5
