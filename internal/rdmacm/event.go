package rdmacm

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// eventSize is the length of an event, struct rdma_ucm_event_resp.
const eventSize = 336

// event is an event as the kernel reports it.
type event struct {
	uid    uint64
	id     uint32 // the kernel's number; of a connect request, of the new ID
	kind   EventType
	status int32
	raw    abi.CMEventResp
}

var errShortEvent = errors.New("rdma_cm: an event is shorter than it must be")

// decodeEvent reads an event. What follows the status is judged by whoever knows the ID's port space.
func decodeEvent(b []byte) (*event, error) {
	if len(b) < eventSize {
		return nil, errShortEvent
	}
	var e event
	copy(bytesOf(&e.raw), b)
	e.uid, e.id, e.kind, e.status = e.raw.UID, e.raw.ID, EventType(e.raw.Event), int32(e.raw.Status)
	return &e, nil
}

// param is the event's union, from its member at offset on.
func (e *event) param(offset int) []byte { return bytesOf(&e.raw)[offset:] }

// conn reads the parameters of a connection.
func (e *event) conn() (ConnParam, error) {
	var p abi.CMConnParam
	copy(bytesOf(&p), e.param(abi.CMEventRespConnOffset))
	if p.QPNum > uint32(ib.MaxQPN) {
		return ConnParam{}, fmt.Errorf("rdma_cm: event %v with the QP number %#x", e.kind, p.QPNum)
	}
	return ConnParam{
		QPN:                ib.QPN(p.QPNum),
		PrivateData:        privateData(&p.PrivateData, p.PrivateDataLen),
		SRQ:                p.SRQ != 0,
		ResponderResources: p.ResponderResources,
		InitiatorDepth:     p.InitiatorDepth,
		FlowControl:        p.FlowControl != 0,
		RetryCount:         p.RetryCount & ib.MaxRetry,
		RNRRetryCount:      p.RNRRetryCount & ib.MaxRetry,
	}, nil
}

// ud reads the address of a datagram QP.
func (e *event) ud() (UDParam, error) {
	var p abi.CMUDParam
	copy(bytesOf(&p), e.param(abi.CMEventRespUDOffset))
	if p.QPNum > uint32(ib.MaxQPN) {
		return UDParam{}, fmt.Errorf("rdma_cm: event %v with the QP number %#x", e.kind, p.QPNum)
	}
	return UDParam{
		QPN:         ib.QPN(p.QPNum),
		QKey:        ib.QKey(p.QKey),
		AH:          ahAttr(&p.AHAttr),
		PrivateData: privateData(&p.PrivateData, p.PrivateDataLen),
	}, nil
}

// privateData copies what n says there is. n cannot exceed the array: it is a byte, and the array has 256.
func privateData(b *[abi.RDMA_MAX_PRIVATE_DATA]byte, n uint8) []byte {
	if n == 0 {
		return nil
	}
	return slices.Clone(b[:n])
}

func ahAttr(a *abi.AHAttr) ib.AHAttr {
	to := ib.AHAttr{DLID: ib.LID(a.DLID), SL: a.SL, Port: a.PortNum}
	if a.IsGlobal != 0 {
		to.DGID = a.GRH.DGID
		to.SGIDIndex = int(a.GRH.SGIDIndex)
		to.HopLimit = a.GRH.HopLimit
		to.TrafficClass = a.GRH.TrafficClass
		to.FlowLabel = a.GRH.FlowLabel
	}
	return to
}

// failure is the error that an event of failure stands for, to an ID of port space ps.
func (e *event) failure(ps PortSpace) error {
	switch {
	case e.kind == EventRejected && e.status < 0: // iWARP: an errno
		p, _ := e.conn()
		return &RejectedError{Errno: syscall.Errno(-int64(e.status)), PrivateData: p.PrivateData}
	case e.kind == EventRejected:
		p, _ := e.conn()
		r := &RejectedError{Reason: Reason(min(e.status, 0xffff))}
		if r.Reason == ReasonConsumer { // what other reasons have there is nobody's message
			r.PrivateData = p.PrivateData
		}
		return r
	case e.kind == EventUnreachable && ps == UDP && e.status > 0: // the answer to a SIDR request that says no
		p, _ := e.ud()
		return &RejectedError{SIDR: SIDRStatus(min(e.status, 0xff)), PrivateData: p.PrivateData}
	}
	return &EventError{Event: e.kind, Status: e.status}
}

// udPrivateData is the private data of a datagram QP's event alone: in a request the kernel sets nothing else.
func (e *event) udPrivateData() []byte {
	var p abi.CMUDParam
	copy(bytesOf(&p), e.param(abi.CMEventRespUDOffset))
	return privateData(&p.PrivateData, p.PrivateDataLen)
}
