package qp

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// RandomPSN returns a starting PSN that a stranger cannot guess.
func RandomPSN() ib.PSN {
	var b [4]byte
	rand.Read(b[:]) // never fails
	return ib.PSN(binary.LittleEndian.Uint32(b[:])) & ib.MaxPSN
}

// Init takes an RC or UC queue pair from Reset to Init: from then on receives may be posted. access is what the peer
// may do through it, any of ib.AccessRemoteRead, RemoteWrite and RemoteAtomic; the regions' own rights count as well.
func (q *QP) Init(ctx context.Context, port uint8, access ib.Access) error {
	return q.Modify(ctx, &ib.QPAttr{State: ib.Init, Port: port, Access: access},
		ib.AttrState|ib.AttrPKeyIndex|ib.AttrPort|ib.AttrAccess)
}

// Endpoint is what a peer must know of a queue pair to connect its own to it.
type Endpoint struct {
	GID ib.GID // of the port
	LID ib.LID // of the port; InfiniBand only
	QPN ib.QPN
	PSN ib.PSN // of the first packet that this side sends
	// UDPPort is where a software NIC receives packets for the GID (verbs.Context.UDPPort); 0: it is another device.
	UDPPort uint16
}

// ConnectParams describe a connection. Zero fields take their defaults. The timers and retries are rounded up to what
// the wire can express; Query tells.
type ConnectParams struct {
	Remote   Endpoint // the peer's; required
	LocalPSN ib.PSN   // of the first packet that this side sends: the PSN in the Endpoint that the peer was given

	SGIDIndex    int    // the slot of the own port's GID table to send from
	MTU          ib.MTU // both sides must use the same; default the GID's MTU, or the port's active MTU
	HopLimit     uint8  // default 64
	TrafficClass uint8
	FlowLabel    uint32
	SL           uint8

	// RC only.

	// AckTimeout is how long the device waits for an acknowledgement before it sends again; default 67 ms.
	AckTimeout time.Duration
	// RetryCount is how many times it sends again; 1 to 7, default 7; -1 means 0. On rxe, 7 has no end.
	RetryCount int
	// RNRRetry is how many times it tries again when the peer has no receive posted; 1 to 6, 7 for ever; default 7;
	// -1 means 0.
	RNRRetry int
	// MinRNRTimer is how long the peer is asked to wait when no receive is posted here; default 120 us.
	MinRNRTimer time.Duration
	// MaxRdAtomic is how many RDMA READs and atomics of this side can be in flight, MaxDestRdAtomic how many of the peer's.
	// The former must not exceed the peer's latter. Default: 16, or the device's limit if that is lower; -1 means 0.
	MaxRdAtomic     int
	MaxDestRdAtomic int
}

// Connect takes an RC or UC queue pair from Init through RTR to RTS. If it fails, the queue pair stays in Init or RTR:
// Close it, or move it to Reset and start again.
func (q *QP) Connect(ctx context.Context, p ConnectParams) error {
	cur, err := q.Query()
	if err != nil {
		return err
	}
	rtr := &ib.QPAttr{
		State: ib.RTR, PathMTU: p.MTU, DestQPN: p.Remote.QPN, RQPSN: p.Remote.PSN,
		AH: ib.AHAttr{DGID: p.Remote.GID, DLID: p.Remote.LID, SGIDIndex: p.SGIDIndex, HopLimit: p.HopLimit,
			TrafficClass: p.TrafficClass, FlowLabel: p.FlowLabel, SL: p.SL, Port: cur.Port, UDPPort: p.Remote.UDPPort},
	}
	rts := &ib.QPAttr{State: ib.RTS, SQPSN: p.LocalPSN}
	toRTR, toRTS := ib.AttrState|rtrRC, ib.AttrState|rtsRC
	if q.typ != ib.RC {
		toRTR, toRTS = ib.AttrState|rtrUC, ib.AttrState|ib.AttrSQPSN
	}
	if err := check(q.typ, cur.State, rtr, toRTR); err != nil { // in Reset there is no port yet to ask about
		return q.err("modify_qp", err)
	}
	if rtr.PathMTU == 0 {
		if rtr.PathMTU, err = q.defaultMTU(cur.Port, p.SGIDIndex); err != nil {
			return err
		}
	}
	if rtr.AH.HopLimit == 0 {
		rtr.AH.HopLimit = 64
	}
	if q.typ == ib.RC {
		if err := q.reliability(p, rtr, rts); err != nil {
			return err
		}
	}
	if err := q.Modify(ctx, rtr, toRTR); err != nil {
		return err
	}
	return q.Modify(ctx, rts, toRTS)
}

// defaultMTU is the largest path MTU that the own side can use.
func (q *QP) defaultMTU(port uint8, sgid int) (ib.MTU, error) {
	pa, err := q.pd.Context().QueryPort(port)
	if err != nil {
		return 0, err
	}
	gids, err := q.pd.Context().GIDs(port)
	if err != nil {
		return 0, err
	}
	for _, g := range gids {
		if g.Index == sgid && g.MTU != 0 {
			return g.MTU, nil
		}
	}
	return pa.ActiveMTU, nil
}

// reliability fills in the attributes that only RC has.
func (q *QP) reliability(p ConnectParams, rtr, rts *ib.QPAttr) error {
	a, err := q.pd.Context().QueryDevice()
	if err != nil {
		return err
	}
	if p.AckTimeout == 0 {
		p.AckTimeout = 67 * time.Millisecond
	}
	if p.MinRNRTimer == 0 {
		p.MinRNRTimer = DefaultMinRNRTimer
	}
	rtr.MinRNRTimer = ib.RNRTimerFor(p.MinRNRTimer)
	rtr.MaxDestRdAtomic = clamp(p.MaxDestRdAtomic, min(16, a.MaxQPRdAtomic), a.MaxQPRdAtomic)
	rts.MaxRdAtomic = clamp(p.MaxRdAtomic, min(16, a.MaxQPInitRdAtom), a.MaxQPInitRdAtom)
	rts.AckTimeout = ib.AckTimeoutFor(p.AckTimeout)
	rts.RetryCount = clamp(p.RetryCount, ib.MaxRetry, ib.MaxRetry)
	rts.RNRRetry = clamp(p.RNRRetry, ib.RNRRetryForever, ib.MaxRetry)
	return nil
}

// clamp encodes a count of ConnectParams: 0 is the default, negative is 0.
func clamp(n, def, limit int) uint8 {
	switch {
	case n == 0:
		n = def
	case n < 0:
		n = 0
	}
	return uint8(min(n, limit, 255))
}

// ActivateUD takes a UD queue pair from Reset to RTS. Datagrams arrive that carry qkey; psn is that of the first one
// sent.
func (q *QP) ActivateUD(ctx context.Context, port uint8, qkey ib.QKey, psn ib.PSN) error {
	if err := q.Modify(ctx, &ib.QPAttr{State: ib.Init, Port: port, QKey: qkey}, ib.AttrState|initUD); err != nil {
		return err
	}
	if err := q.Modify(ctx, &ib.QPAttr{State: ib.RTR}, ib.AttrState); err != nil {
		return err
	}
	return q.Modify(ctx, &ib.QPAttr{State: ib.RTS, SQPSN: psn}, ib.AttrState|ib.AttrSQPSN)
}

// ActivateRaw takes a raw packet queue pair from Reset to RTS: frames can be sent, and those are received that its rules say.
func (q *QP) ActivateRaw(ctx context.Context, port uint8) error {
	if err := q.Modify(ctx, &ib.QPAttr{State: ib.Init, Port: port}, ib.AttrState|ib.AttrPort); err != nil {
		return err
	}
	if err := q.Modify(ctx, &ib.QPAttr{State: ib.RTR}, ib.AttrState); err != nil {
		return err
	}
	return q.Modify(ctx, &ib.QPAttr{State: ib.RTS}, ib.AttrState)
}

// Fail moves the queue pair to Err from any state but Reset: outstanding work requests complete with ib.WCFlushErr.
func (q *QP) Fail(ctx context.Context) error {
	return q.Modify(ctx, &ib.QPAttr{State: ib.Err}, ib.AttrState)
}

// Reset moves the queue pair to Reset from any state. Outstanding work requests are forgotten without a completion, and
// completions that were not polled yet are dropped.
func (q *QP) Reset(ctx context.Context) error {
	return q.Modify(ctx, &ib.QPAttr{State: ib.Reset}, ib.AttrState)
}
