package qp

import (
	"errors"
	"fmt"
	"net"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/life"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A Flow is a flow rule: frames that match it come to a raw packet queue pair, until Close. It is safe for concurrent use.
type Flow struct {
	life life.Node
	drv  driver.Flow
	qp   *QP
}

// Steer makes a rule by which a raw packet queue pair, in any state, receives frames. It needs the capability ib.CapFlowSteering, and the
// process CAP_NET_RAW, as making the queue pair does; else the error matches errors.ErrUnsupported, or syscall.EPERM. rule is read during the call.
//
// A raw packet queue pair sends and receives Ethernet frames, headers and all, but for the frame check sequence, which is the device's. A
// request to send is an ib.OpSend: ib.SendWR.Inline is the beginning of the frame, and what the SGEs name follows. Some devices must have
// the beginning inline (ib.DeviceAttr.MinFrameInline); 18 bytes, an Ethernet header with a VLAN tag, do on all. A completion says that the
// frame has left, not that anybody has it; frames that are longer than the port takes get lost. A receive takes one frame,
// ib.WC.ByteLen bytes. A frame that comes when no receive is posted is lost; one that is longer than the receive ends it with
// ib.WCLocalLengthErr, and takes the queue pair to Err.
func (q *QP) Steer(rule ib.FlowRule) (*Flow, error) {
	f, err := q.steer(rule)
	if err != nil {
		return nil, q.err("create_flow", err)
	}
	life.Watch(f, &f.life, "qp.Flow", q.pd.Context().Name())
	return f, nil
}

func (q *QP) steer(rule ib.FlowRule) (*Flow, error) {
	if q.life.Closed() {
		return nil, net.ErrClosed
	}
	s, ok := q.drv.(driver.Steerer)
	if !ok || q.typ != ib.RawPacket {
		return nil, fmt.Errorf("%w: flow rules for queue pairs of type %v", errors.ErrUnsupported, q.typ)
	}
	if rule.Port == 0 {
		rule.Port = 1
	}
	if err := rule.Check(); err != nil {
		return nil, err
	}
	a, err := q.pd.Context().QueryDevice()
	if err != nil {
		return nil, err
	}
	if !a.Caps.Has(ib.CapFlowSteering) {
		return nil, fmt.Errorf("%w: this device has no flow rules", errors.ErrUnsupported)
	}
	f := &Flow{qp: q}
	if err := f.life.Attach(&q.life); err != nil {
		return nil, err
	}
	if f.drv, err = s.Steer(&rule); err != nil {
		f.life.Abandon()
		return nil, err
	}
	return f, nil
}

// QP returns the queue pair that gets the frames.
func (f *Flow) QP() *QP { return f.qp }

// Close ends the rule. Frames that have come in before may still complete. It has to be closed before its queue pair.
func (f *Flow) Close() error { return f.qp.err("destroy_flow", f.life.Close(f.drv.Close)) }
