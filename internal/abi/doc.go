// Package abi holds the structs and numbers of the Linux kernel's RDMA interface: the uverbs commands, the connection
// manager, RDMA netlink, and the queues and driver data of rxe, siw and mlx5. Kernel structs are data: no methods, no
// logic, names from the kernel in Go's spelling, constants in the kernel's own.
//
// Most of it is generated from the kernel's headers by internal/cmd/genabi, and its layouts are tested against what the C
// compiler said (testdata). By hand are the big-endian types (be.go) and what is newer than those headers (newer.go).
//
// # Unions
//
// A union without a name is used as in C: it has the field of its first member that is as large as the union, as in
// SiwSQE.RAddr. A union with a name is a field of unsigned words, as in RxeSendWR.WR. Where a member lies is a constant,
// counted from the start of the struct around it: RxeSendWRRdmaRemoteAddrOffset. An anonymous struct in a union has a type
// besides, RxeSendWRRdma, to which a pointer to the union can be converted: the words have its alignment, and its size or
// more.
//
// # Flexible arrays
//
// An array without a length at the end of a struct is left out; its offset is a constant, as RegMRRespDriverDataOffset.
// Not everywhere is that the struct's size.
package abi

//go:generate go run ../cmd/genabi
