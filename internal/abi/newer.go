package abi

import "structs"

// What the headers of Linux 6.1 lack. Once the package is generated from headers that have a name, it is declared twice
// and goes from here.

// RDMA FLUSH and ATOMIC WRITE (IBA annex A19), since Linux 6.2. An older kernel refuses the access flags, and completes
// the work requests with an error: look at the device's capability flags first.
const (
	IB_UVERBS_WR_FLUSH        = 14
	IB_UVERBS_WR_ATOMIC_WRITE = 15

	IB_UVERBS_WC_FLUSH        = 8
	IB_UVERBS_WC_ATOMIC_WRITE = 9

	IB_UVERBS_ACCESS_FLUSH_GLOBAL     = 0x100
	IB_UVERBS_ACCESS_FLUSH_PERSISTENT = 0x200

	IB_UVERBS_DEVICE_FLUSH_GLOBAL     = 1 << 38 // of ExQueryDeviceResp.DeviceCapFlagsEx, as those below
	IB_UVERBS_DEVICE_FLUSH_PERSISTENT = 1 << 39
	IB_UVERBS_DEVICE_ATOMIC_WRITE     = 1 << 40

	// enum ib_placement_type: what a flush guarantees.
	IB_FLUSH_GLOBAL     = 1
	IB_FLUSH_PERSISTENT = 2

	// enum ib_selectivity_level: what is flushed.
	IB_FLUSH_RANGE = 0
	IB_FLUSH_MR    = 1
)

// RxeSendWRFlush is wr.flush in struct rxe_send_wr (rdma/rdma_user_rxe.h), since Linux 6.2. An atomic write uses
// RxeSendWRRdma, and has its 8 bytes where inline data is.
type RxeSendWRFlush struct {
	_          structs.HostLayout
	RemoteAddr uint64
	Length     uint32
	RKey       uint32
	Type       uint8 // bits IB_FLUSH_GLOBAL and IB_FLUSH_PERSISTENT
	Level      uint8 // IB_FLUSH_RANGE or IB_FLUSH_MR
	_          [6]byte
}

// The members of RxeSendWRFlush in RxeSendWR.
const (
	RxeSendWRFlushRemoteAddrOffset = 24 // wr.flush.remote_addr
	RxeSendWRFlushLengthOffset     = 32 // wr.flush.length
	RxeSendWRFlushRKeyOffset       = 36 // wr.flush.rkey
	RxeSendWRFlushTypeOffset       = 40 // wr.flush.type
	RxeSendWRFlushLevelOffset      = 41 // wr.flush.level
)
