package cmemu

import (
	"errors"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Connections: CONNECT, LISTEN, ACCEPT, REJECT, DISCONNECT, NOTIFY, and the attributes of queue pairs.

// errnoOf is why something has failed, as the kernel says it.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.Is(err, driver.ErrClosed):
		return unix.EIO
	case errors.As(err, &errno):
		return errno
	}
	return unix.EINVAL
}

// params reads what a program says of its side; false: it says more than fits, which is private bytes.
func params(q *abi.CMConnParam, ece *abi.CMECE, private int) (*cm.Params, bool) {
	p := &cm.Params{QPN: ib.QPN(q.QPNum) & ib.MaxQPN, ResponderResources: q.ResponderResources, InitiatorDepth: q.InitiatorDepth,
		RNRRetry: min(q.RNRRetryCount, ib.MaxRetry), RetryCount: min(q.RetryCount, ib.MaxRetry), SRQ: q.SRQ != 0, FlowControl: q.FlowControl != 0,
		Private: slices.Clone(q.PrivateData[:q.PrivateDataLen])}
	if e := eceOf(ece.VendorID, ece.AttrMod); e.VendorID != 0 { // the queue pair leaves go-back-N for nobody, as the client makes it plainly
		p.VendorID, p.VendorOptions = e.VendorID, e.AttrMod
	}
	return p, len(p.Private) <= private
}

func connect(w *call) syscall.Errno {
	const least = 280 // what there was before ECE
	q, ok := argAtLeast[abi.CMConnect](w, least)
	if !ok || q.ConnParam.Valid == 0 {
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		if x.typ == ib.UD {
			return x.ask(q.ConnParam.PrivateData[:q.ConnParam.PrivateDataLen])
		}
		p, fits := params(&q.ConnParam, &q.ECE, cm.MaxRequest)
		if !x.is(routeResolved) || !fits || x.dst.ip.IsMulticast() {
			return unix.EINVAL
		}
		p.PSN, p.MTU, p.FlowLabel, p.TrafficClass, p.Bound = x.psn, x.path.mtu, x.path.flow, x.path.tclass, true
		m := x.m
		return errnoOf(x.at.Manage(func(e *cm.Engine, now time.Duration) error {
			c, err := e.Connect(now, x.src.port, x.dst.addrPort(), p, x)
			if err != nil {
				return err
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			x.conn, x.state, x.phase = c, connecting, reqSent
			x.said = terms{retryCount: p.RetryCount, rnrRetry: p.RNRRetry, responder: p.ResponderResources, initiator: p.InitiatorDepth}
			return nil
		}))
	})
}

// ask asks who takes the datagrams of the service at the peer.
func (x *id) ask(private []byte) syscall.Errno {
	if !x.is(routeResolved) || len(private) > cm.MaxQuestion || x.dst.ip.IsMulticast() {
		return unix.EINVAL
	}
	return errnoOf(x.at.Manage(func(e *cm.Engine, now time.Duration) error {
		c, err := e.Resolve(now, x.src.port, x.dst.addrPort(), private, x)
		if err != nil {
			return err
		}
		x.set(func() { x.conn, x.state, x.phase = c, connecting, reqSent })
		return nil
	}))
}

func listen(w *call) syscall.Errno {
	q, ok := arg[abi.CMListen](w)
	if !ok {
		return unix.EINVAL
	}
	return w.with(q.ID, func(x *id) syscall.Errno {
		backlog := q.Backlog
		if backlog == 0 || backlog > maxBacklog {
			backlog = maxBacklog
		}
		return x.listen(backlog)
	})
}

func (x *id) listen(backlog uint32) syscall.Errno {
	if !x.is(addrBound) {
		if errno := x.bind(anyOf(unix.AF_INET)); errno != 0 {
			return errno
		}
	}
	if x.src.family == afIB || x.space == abi.RDMA_PS_IB {
		return unix.EPROTONOSUPPORT
	}
	at := []place{x.at}
	var errno syscall.Errno
	switch {
	case x.at.dev == nil:
		at, errno = x.m.places(x.takes)
	case !x.at.Standard():
		errno = unix.EADDRINUSE
	}
	if errno != 0 {
		return errno
	}
	m := x.m
	m.mu.Lock()
	if x.reuse { // who listens shares with nobody
		if errno := m.checkPort(x, false); errno != 0 {
			m.mu.Unlock()
			return errno
		}
		x.reuse = false
	}
	x.state, x.backlog = listening, backlog // requests may come from now on
	m.mu.Unlock()
	for i, p := range at {
		if err := x.listenAt(p); err != nil {
			x.unlisten(at[:i], x.src.port)
			x.set(func() { x.state, x.backlog = addrBound, 0 })
			return errnoOf(err)
		}
	}
	x.set(func() { x.listens = at })
	if x.at.dev == nil {
		x.m.followAddresses()
	}
	return 0
}

func (x *id) listenAt(p place) error {
	return p.Manage(func(e *cm.Engine, _ time.Duration) error {
		if x.typ == ib.UD {
			return e.ListenDatagrams(x.src.port, &service{x, p})
		}
		return e.Listen(x.src.port, &service{x, p})
	})
}

// listenMore listens at the addresses that there are now, and were not.
func (x *id) listenMore() {
	at, _ := x.m.places(x.takes)
	for _, p := range at {
		if !slices.Contains(x.listens, p) && x.listenAt(p) == nil {
			x.set(func() { x.listens = append(x.listens, p) })
		}
	}
}

// takes reports whether a listener at any address takes requests at that one.
func (x *id) takes(a netip.Addr) bool {
	return !x.afOnly || a.Is4() == (x.src.family == unix.AF_INET)
}

func (x *id) unlisten(from []place, port uint16) {
	for _, p := range from {
		p.Manage(func(e *cm.Engine, _ time.Duration) error { // if the device is closed, there is nothing to undo
			if x.typ == ib.UD {
				e.UnlistenDatagrams(port)
			} else {
				e.Unlisten(port)
			}
			return nil
		})
	}
}

// A service is a listener at one of its places.
type service struct {
	x  *id
	at place
}

// Request implements cm.Service: the request is an ID of its own, and an event of the listener. What there is no room for the kernel
// refuses as a program would.
func (s *service) Request(c *cm.Conn) (cm.Handler, roce.RejectReason) {
	l, m := s.x, s.x.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.dead || l.state != listening || l.backlog == 0 || l.ch.full() {
		return nil, roce.RejectConsumer
	}
	x := newID(m, l.space, l.typ)
	if m.add(x, l.ch) != 0 {
		return nil, roce.RejectConsumer
	}
	x.src, x.dst, x.at = sockaddrOf(c.LocalAddr()), sockaddrOf(c.RemoteAddr()), s.at
	l.backlog--
	if q := c.Question(); q != nil {
		x.path = path{mtu: s.at.MTU(), hops: hopLimit, life: packetLife}
		x.state, x.phase, x.conn, x.qkey = connecting, reqReceived, c, defaultQKey
		p := abi.CMUDParam{PrivateDataLen: cm.MaxQuestion}
		copy(p.PrivateData[:], q.Private[roce.IPHelloLen:])
		l.ch.put(&event{of: l, made: x, resp: eventOf(l.uid, x.num, eventConnectRequest, 0, bytesOf(&p), abi.CMECE{})})
		return x, 0
	}
	q := c.REQ()
	x.path = path{mtu: q.MTU, flow: q.FlowLabel, tclass: q.TrafficClass, hops: q.HopLimit, sl: q.SL, life: q.LocalAckTimeout}
	if x.path.life > 0 {
		x.path.life--
	}
	x.state, x.phase, x.conn = connecting, reqReceived, c
	x.meet(q.QPN)
	x.tos = q.TrafficClass
	p := abi.CMConnParam{QPNum: q.QPN, PrivateDataLen: cm.MaxRequest, SRQ: bit(q.SRQ), ResponderResources: q.InitiatorDepth,
		InitiatorDepth: q.ResponderResources, FlowControl: bit(q.FlowControl), RetryCount: q.RetryCount, RNRRetryCount: q.RNRRetryCount}
	copy(p.PrivateData[:], q.Private[roce.IPHelloLen:])
	l.ch.put(&event{of: l, made: x, resp: eventOf(l.uid, x.num, eventConnectRequest, 0, bytesOf(&p), eceOf(q.VendorID, q.VendorOptions))})
	return x, 0
}

func accept(w *call) syscall.Errno {
	const least = 288 // what there was before ECE
	q, ok := argAtLeast[abi.CMAccept](w, least)
	if !ok {
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		if !x.is(connecting) {
			return unix.EINVAL
		}
		if x.typ == ib.UD {
			return x.answer(&q)
		}
		var p *cm.Params // nil: the peer's answer is confirmed
		fits := true
		if q.ConnParam.Valid != 0 {
			p, fits = params(&q.ConnParam, &q.ECE, cm.MaxReply)
		}
		m := x.m
		return errnoOf(x.at.Manage(func(_ *cm.Engine, now time.Duration) error {
			var err error
			switch {
			case !fits:
				err = unix.EINVAL
			case p == nil:
				err = x.ready()
			default:
				p.PSN = x.psn
				if err = x.conn.Accept(now, p); err == nil {
					m.mu.Lock()
					defer m.mu.Unlock()
					x.uid, x.phase = q.UID, repSent
					x.said = terms{responder: p.ResponderResources, initiator: p.InitiatorDepth}
					return nil
				}
			}
			if err != nil { // as the kernel does, the peer is told that nothing will come of it
				if x.conn.Reject(now, roce.RejectConsumer, nil) == nil {
					x.set(func() { x.phase = over })
				}
				return unix.EINVAL
			}
			return nil
		}))
	})
}

// answer says which queue pair takes the service's datagrams, as a command says it.
func (x *id) answer(q *abi.CMAccept) syscall.Errno {
	p := &q.ConnParam
	a := &cm.Answer{QPN: ib.QPN(p.QPNum) & ib.MaxQPN, QKey: x.qkey, Private: slices.Clone(p.PrivateData[:p.PrivateDataLen])}
	if p.Valid == 0 {
		return unix.EINVAL
	}
	return x.say(a, func() { x.uid = q.UID })
}

// say answers a question, and calls then if it was one, with m.mu held.
func (x *id) say(a *cm.Answer, then func()) syscall.Errno {
	err := x.at.Manage(func(_ *cm.Engine, now time.Duration) error {
		if err := x.conn.Answer(now, a); err != nil {
			return err
		}
		x.set(func() {
			x.phase = over
			if then != nil {
				then()
			}
		})
		return nil
	})
	switch {
	case err == nil:
		return 0
	case errors.Is(err, driver.ErrClosed):
		return unix.EIO
	}
	return unix.EINVAL
}

// ready confirms the peer's answer. Called as Manage calls.
func (x *id) ready() error {
	x.m.mu.Lock()
	was := x.phase
	if was == repReceived {
		x.phase = established
	}
	x.m.mu.Unlock()
	if was != repReceived {
		return unix.EINVAL
	}
	x.conn.Ready()
	return nil
}

func reject(w *call) syscall.Errno {
	q, ok := arg[abi.CMReject](w)
	if !ok {
		return unix.EINVAL
	}
	const unsupported = 35 // IB_CM_REJ_VENDOR_OPTION_NOT_SUPPORTED
	reason := roce.RejectReason(q.Reason)
	switch reason {
	case 0:
		reason = roce.RejectConsumer
	case roce.RejectConsumer, unsupported:
	default:
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		if x.conn == nil {
			return unix.EINVAL
		}
		if x.typ == ib.UD {
			return x.say(&cm.Answer{Status: cm.StatusRejected, Private: q.PrivateData[:q.PrivateDataLen]}, nil)
		}
		err := x.at.Manage(func(_ *cm.Engine, now time.Duration) error {
			return x.conn.Reject(now, reason, q.PrivateData[:q.PrivateDataLen])
		})
		if errors.Is(err, driver.ErrClosed) {
			return unix.EIO
		}
		if err != nil {
			return unix.EINVAL
		}
		x.set(func() { x.phase = over })
		return 0
	})
}

func disconnect(w *call) syscall.Errno {
	q, ok := arg[abi.CMDisconnect](w)
	if !ok {
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		if x.conn == nil {
			return unix.EINVAL
		}
		x.at.Manage(func(_ *cm.Engine, now time.Duration) error { // of a connection that is none, there is nothing to end
			x.conn.Disconnect(now)
			return nil
		})
		return 0
	})
}

func notify(w *call) syscall.Errno {
	q, ok := arg[abi.CMNotify](w)
	if !ok {
		return unix.EINVAL
	}
	return w.withDevice(q.ID, func(x *id) syscall.Errno {
		if x.conn == nil || q.Event != uint32(ib.EventCommEst) {
			return unix.EINVAL
		}
		heard := false
		err := x.at.Manage(func(*cm.Engine, time.Duration) error {
			if heard = x.conn.Heard(); heard {
				x.Established() // here, as the engine does it: else the end may be told before
			}
			return nil
		})
		if err != nil || heard {
			return errnoOf(err)
		}
		x.m.mu.Lock()
		defer x.m.mu.Unlock()
		if x.phase == established {
			return unix.EISCONN
		}
		return unix.EINVAL
	})
}

// attributes fills in what the queue pair is to be modified with to come to the state of r.
func (x *id) attributes(r *abi.QPAttr) syscall.Errno {
	to := ib.QPState(r.QPState)
	if x.typ == ib.UD {
		x.m.mu.Lock()
		defer x.m.mu.Unlock()
		r.QPAttrMask, r.PortNum, r.QKey = uint32(ib.AttrState|ib.AttrPKeyIndex|ib.AttrPort|ib.AttrQKey), 1, x.qkey
		return 0
	}
	if x.conn == nil {
		r.QPAttrMask, r.PortNum = uint32(ib.AttrState|ib.AttrPKeyIndex|ib.AttrPort|ib.AttrAccess), 1
		if to == ib.RTR {
			r.RQPSN = uint32(x.psn)
		}
		return 0
	}
	var timeout ib.AckTimeout
	err := x.at.Manage(func(*cm.Engine, time.Duration) error {
		timeout = x.conn.AckTimeout()
		return nil
	})
	if err != nil {
		return errnoOf(err)
	}
	x.m.mu.Lock()
	defer x.m.mu.Unlock()
	var peer struct {
		qpn uint32
		psn ib.PSN
	}
	agreed := x.said
	q := x.conn.REQ()
	switch {
	case x.phase == over:
		return unix.EINVAL
	case q != nil:
		peer.qpn, peer.psn = q.QPN, q.StartingPSN
		agreed.retryCount, agreed.rnrRetry = q.RetryCount, q.RNRRetryCount
		if x.phase == reqReceived {
			agreed.responder, agreed.initiator = q.InitiatorDepth, q.ResponderResources
		}
	case x.reply != nil:
		peer.qpn, peer.psn = x.reply.QPN, x.reply.StartingPSN
		agreed.rnrRetry, agreed.responder, agreed.initiator = x.reply.RNRRetryCount, x.reply.InitiatorDepth, x.reply.ResponderResources
	case to != ib.Init:
		return unix.EINVAL // what is asked for is not known yet
	}
	switch p := &x.path; to {
	case ib.Init:
		access := ib.AccessRemoteWrite
		if agreed.responder != 0 {
			access |= ib.AccessRemoteRead | ib.AccessRemoteAtomic
		}
		r.QPAttrMask, r.PortNum, r.QPAccessFlags = uint32(ib.AttrState|ib.AttrPKeyIndex|ib.AttrPort|ib.AttrAccess), 1, uint32(access)
	case ib.RTR:
		r.QPAttrMask = uint32(ib.AttrState | ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN | ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer)
		r.AHAttr = x.addressHandle()
		r.PathMTU, r.DestQPNum, r.RQPSN, r.MaxDestRdAtomic = uint32(p.mtu), peer.qpn, uint32(x.psn), agreed.responder
	case ib.RTS:
		r.QPAttrMask = uint32(ib.AttrState | ib.AttrSQPSN | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrMaxRdAtomic | ib.AttrAckTimeout)
		r.SQPSN, r.RetryCnt, r.RNRRetry, r.MaxRdAtomic, r.Timeout = uint32(peer.psn), agreed.retryCount, agreed.rnrRetry, agreed.initiator, uint8(timeout)
		if x.ackTimeout != nil {
			r.Timeout = *x.ackTimeout
		}
	default:
		return unix.EINVAL
	}
	return 0
}
