package rdmacm

import (
	"fmt"
	"net/netip"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// ConnParam is what one side of a connection tells the other. In what is received, the kernel has already swapped the
// peer's view for ours: ResponderResources and InitiatorDepth are the most that this side may use in turn.
type ConnParam struct {
	// QPN is the sender's queue pair. On iWARP it must exist, as the kernel moves it to RTS itself; it does not travel,
	// so that received ones are 0.
	QPN ib.QPN
	// PrivateData is for the program on the other side: up to MaxConnectData bytes with a request, MaxAcceptData with its
	// acceptance. Received on InfiniBand and RoCE it has the length that the message can carry, zeros at the end: a
	// format of one's own has to say how long it is. Sent, it is read during the call; received, it is the caller's.
	PrivateData        []byte
	SRQ                bool  // the QP has a shared receive queue
	ResponderResources uint8 // RDMA READs and atomics of the peer in flight that this side can serve
	InitiatorDepth     uint8 // RDMA READs and atomics in flight that this side wants to have
	FlowControl        bool
	RetryCount         uint8 // 0..7, for lost packets, both ways; ignored when accepting
	// RNRRetryCount is how often the peer shall try again when a receive was not posted here: 0..7, 7 is forever. It is
	// what the peer's InitQPAttr returns as RNRRetry.
	RNRRetryCount uint8
}

// fill checks p and writes it for the kernel. limit is the most private data.
func (p *ConnParam) fill(to *abi.CMConnParam, limit int) error {
	switch {
	case len(p.PrivateData) > limit:
		return fmt.Errorf("private data of %d bytes: at most %d fit", len(p.PrivateData), limit)
	case p.QPN > ib.MaxQPN:
		return fmt.Errorf("%#x is no QP number", uint32(p.QPN))
	case p.RetryCount > ib.MaxRetry || p.RNRRetryCount > ib.MaxRetry:
		return fmt.Errorf("retry counts of %d and %d: at most %d", p.RetryCount, p.RNRRetryCount, ib.MaxRetry)
	}
	*to = abi.CMConnParam{
		QPNum:              uint32(p.QPN),
		PrivateDataLen:     uint8(len(p.PrivateData)),
		SRQ:                toByte(p.SRQ),
		ResponderResources: p.ResponderResources,
		InitiatorDepth:     p.InitiatorDepth,
		FlowControl:        toByte(p.FlowControl),
		RetryCount:         p.RetryCount,
		RNRRetryCount:      p.RNRRetryCount,
		Valid:              1,
	}
	copy(to.PrivateData[:], p.PrivateData)
	return nil
}

func toByte(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// UDParam is how to reach a queue pair of the port space UDP. In a request only PrivateData is set.
type UDParam struct {
	QPN         ib.QPN
	QKey        ib.QKey
	AH          ib.AHAttr
	PrivateData []byte // as in ConnParam
}

// Addr is what an ID is bound to.
type Addr struct {
	Local, Remote netip.AddrPort // zero: none. A request's link-local addresses have no zone: they come from the message
	// Bound is whether there is a device: not before ResolveAddr, nor with a wildcard address. The rest is zero without.
	Bound    bool
	NodeGUID ib.GUID
	Port     uint8   // of the device, from 1
	PKey     ib.PKey // of the IPoIB interface; 0 elsewhere
	// DeviceIndex is the device's index in the kernel's list (RDMA_NLDEV_ATTR_DEV_INDEX; not the number of its uverbs
	// node). Old kernels do not tell, and HasDeviceIndex is false: NodeGUID has to do.
	DeviceIndex    uint32
	HasDeviceIndex bool
}
