package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/internal/softnic/simnet"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

const (
	// patience is how long a side waits for what must happen. It only bounds the time to a failure.
	patience = 2 * testutil.Patience
	// quiet is how long a case looks for what must not happen. A slow machine can hide a failure this way, not invent one.
	quiet = 15 * time.Millisecond
)

// handle names an object of a side.
type handle int

// host does what a script asks for: it holds the objects of one side.
type host struct {
	mu      sync.Mutex
	ctx     *verbs.Context
	sim     *simnet.Network // that the device is on; nil: the device is real
	next    handle
	objects map[handle]object
	raw     map[handle][]byte // memory of registered slices, which outlives the region
	conns   map[handle]handle // of QPs that the connection manager has connected
	before  *testutil.Snapshot
}

type object interface{ Close() error }

func newHost() *host {
	return &host{objects: map[handle]object{}, raw: map[handle][]byte{}, conns: map[handle]handle{}}
}

func (h *host) add(o object) handle {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.next++
	h.objects[h.next] = o
	return h.next
}

func get[T object](h *host, n handle) (T, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o, ok := h.objects[n].(T)
	if !ok {
		return o, fmt.Errorf("%w: %T %d", errNotThere, o, n)
	}
	return o, nil
}

// use is for operations on one existing object.
func use[T object, R any](h *host, n handle, f func(T) (R, error)) (R, error) {
	o, err := get[T](h, n)
	if err != nil {
		var r R
		return r, err
	}
	return f(o)
}

func (h *host) context() (*verbs.Context, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ctx == nil {
		return nil, fmt.Errorf("%w: context", errNotThere)
	}
	return h.ctx, nil
}

type none struct{}

type deviceInfo struct {
	Name, Provider string
	Tier           string
	PID            int
	Attr           ib.DeviceAttr
	Port           ib.PortAttr
	GID            ib.GID
	GIDIndex       int
	Addr           netip.Addr // of its net device; not valid if it has none
	UDPPort        uint16     // where it receives, if that is not the standard port
	Net            bool       // the software NIC, over a network
}

// netAddr is where the software NIC meets a network; not valid if it does not.
func (d *deviceInfo) netAddr() netip.Addr {
	if !d.Net {
		return netip.Addr{}
	}
	return d.GID.Addr()
}

// openArgs name a device. Net: of the software NIC, the part that meets a network, at this address.
type openArgs struct {
	Device string
	Net    netip.Addr
}

var opOpen = newOp("open", func(h *host, a openArgs) (deviceInfo, error) {
	c, err := h.open(a)
	if err != nil {
		return deviceInfo{}, err
	}
	h.mu.Lock()
	h.ctx = c
	h.mu.Unlock()
	d := deviceInfo{Name: c.Name(), Provider: c.Provider(), Tier: fmt.Sprint(c.Tier()), PID: os.Getpid()}
	if d.Attr, err = c.QueryDevice(); err != nil {
		return d, err
	}
	if d.Port, err = c.QueryPort(1); err != nil {
		return d, err
	}
	best, err := c.SourceGID(1, netip.Addr{})
	if d.Net = a.Net.IsValid(); d.Net {
		if best, err = c.SourceGIDOf(1, a.Net, ib.GIDRoCEv2); err == nil {
			d.UDPPort, err = c.UDPPort(1, best.Index)
		}
	}
	if err != nil {
		return d, err
	}
	d.GID, d.GIDIndex = best.GID, best.Index
	if best.MTU != 0 {
		d.Port.ActiveMTU = min(d.Port.ActiveMTU, best.MTU)
	}
	d.Addr = addrOf(c.Choice().Device.NetDevs)
	return d, nil
})

// addrOf is the first IPv4 address of net devices.
func addrOf(netdevs []string) netip.Addr {
	for _, name := range netdevs {
		dev, err := net.InterfaceByName(name)
		if err != nil {
			continue
		}
		addrs, _ := dev.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
				return p.Addr()
			}
		}
	}
	return netip.Addr{}
}

var opReach = newOp("check reach", func(h *host, g ib.GID) (string, error) {
	c, err := h.context()
	if err != nil {
		return "", err
	}
	ctx, cancel := h.timeout(patience)
	defer cancel()
	return c.CheckReach(ctx, g)
})

// opCloseAll closes what is left in reverse order of creation, so that children go before parents, then the context.
var opCloseAll = newOp("close all", func(h *host, _ none) (none, error) {
	h.mu.Lock()
	var order []handle
	for n := range h.objects {
		order = append(order, n)
	}
	c := h.ctx
	h.ctx = nil
	clear(h.raw)
	h.mu.Unlock()
	slices.Sort(order)
	slices.Reverse(order)
	var errs []error
	for _, n := range order {
		if err := closeHandle(h, n); err != nil {
			errs = append(errs, err)
		}
	}
	if c != nil {
		if err := c.Close(); err != nil {
			errs = append(errs, fmt.Errorf("context: %w", err))
		}
	}
	return none{}, errors.Join(errs...)
})

// closeConn closes the connection of a QP, if it has one.
func closeConn(h *host, q handle) error {
	h.mu.Lock()
	conn := h.conns[q]
	delete(h.conns, q)
	h.mu.Unlock()
	if conn == 0 {
		return nil
	}
	if err := closeHandle(h, conn); !errors.Is(err, errNotThere) {
		return err
	}
	return nil
}

func closeHandle(h *host, n handle) error {
	if err := closeConn(h, n); err != nil { // before its QP
		return err
	}
	o, err := get[object](h, n)
	if err != nil {
		return err
	}
	if err := o.Close(); err != nil {
		return fmt.Errorf("close %T: %w", o, err)
	}
	h.mu.Lock()
	delete(h.objects, n)
	h.mu.Unlock()
	return nil
}

var opClose = newOp("close", func(h *host, n handle) (none, error) { return none{}, closeHandle(h, n) })

// opCloseAgain closes an object twice more and keeps it: Close must be idempotent.
var opCloseTwice = newOp("close twice", func(h *host, n handle) (none, error) {
	if err := closeConn(h, n); err != nil {
		return none{}, err
	}
	o, err := get[object](h, n)
	if err != nil {
		return none{}, err
	}
	return none{}, errors.Join(o.Close(), o.Close())
})

var opCloseContext = newOp("close context", func(h *host, _ none) (none, error) {
	c, err := h.context()
	if err != nil {
		return none{}, err
	}
	return none{}, c.Close()
})

// Leak checks.

var opSnapshot = newOp("snapshot", func(h *host, _ none) (none, error) {
	h.before = testutil.TakeSnapshot()
	return none{}, nil
})

var opLeaks = newOp("leaks", func(h *host, _ none) (string, error) {
	deadline := time.Now().Add(patience / 2)
	for {
		left := h.before.Diff()
		if left == "" || time.Now().After(deadline) {
			return left, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
})

// Objects.

var opPD = newOp("alloc_pd", func(h *host, _ none) (handle, error) {
	c, err := h.context()
	if err != nil {
		return 0, err
	}
	pd, err := c.AllocPD()
	if err != nil {
		return 0, err
	}
	return h.add(pd), nil
})

type memArgs struct {
	PD     handle
	Size   int
	Access ib.Access
	Slice  bool // an ordinary slice, registered
}

type memInfo struct {
	H    handle
	Addr uint64
	LKey ib.LKey
	RKey ib.RKey
}

var opMem = newOp("reg_mr", func(h *host, a memArgs) (memInfo, error) {
	return use(h, a.PD, func(pd *verbs.PD) (memInfo, error) {
		var m *mr.MR
		var raw []byte
		var err error
		if a.Slice {
			// An odd offset into a larger slice: neither page nor word aligned, unless atomics need it.
			off := 8 + 16*h.intN(200)
			raw = make([]byte, off+a.Size+64)[off : off+a.Size]
			m, err = mr.Register(pd, raw, a.Access)
		} else {
			m, err = mr.Alloc(pd, a.Size, a.Access)
		}
		if err != nil {
			return memInfo{}, err
		}
		if len(m.Bytes()) != a.Size || m.Len() != a.Size || m.Access()&a.Access != a.Access {
			return memInfo{}, fmt.Errorf("asked for %d bytes and %v, got %d, Len %d, %v", a.Size, a.Access, len(m.Bytes()), m.Len(), m.Access())
		}
		i := memInfo{h.add(m), m.Addr(), m.LKey(), m.RKey()}
		if raw != nil {
			h.mu.Lock()
			h.raw[i.H] = raw
			h.mu.Unlock()
		}
		return i, nil
	})
})

type memRange struct {
	H      handle
	Off, N int
	Data   []byte
	Seed   uint64
	Byte   byte
}

func (h *host) bytes(r memRange, n int) ([]byte, error) {
	h.mu.Lock()
	raw := h.raw[r.H]
	h.mu.Unlock()
	if raw != nil {
		return raw[r.Off : r.Off+n], nil
	}
	return use(h, r.H, func(m *mr.MR) ([]byte, error) { return m.Bytes()[r.Off : r.Off+n], nil })
}

var opMemWrite = newOp("write memory", func(h *host, r memRange) (none, error) {
	b, err := h.bytes(r, len(r.Data))
	copy(b, r.Data)
	return none{}, err
})

var opMemRead = newOp("read memory", func(h *host, r memRange) ([]byte, error) {
	b, err := h.bytes(r, r.N)
	return bytes.Clone(b), err
})

type sumArgs struct {
	H           handle
	Areas, Size int
}

// opMemSums returns a checksum of each of the areas that a region starts with.
var opMemSums = newOp("sum memory", func(h *host, a sumArgs) (sums [][]byte, err error) {
	b, err := h.bytes(memRange{H: a.H}, a.Areas*a.Size)
	for ; len(b) > 0; b = b[a.Size:] {
		sum := sha256.Sum256(b[:a.Size])
		sums = append(sums, sum[:])
	}
	return sums, err
})

// pattern fills b with bytes that depend on seed and position.
func pattern(b []byte, seed uint64) {
	g := rand.NewPCG(seed, 0x5eed)
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, g.Uint64())
		b = b[8:]
	}
	var last [8]byte
	binary.LittleEndian.PutUint64(last[:], g.Uint64())
	copy(b, last[:])
}

var opMemPattern = newOp("fill memory", func(h *host, r memRange) (none, error) {
	b, err := h.bytes(r, r.N)
	if err != nil {
		return none{}, err
	}
	if r.Seed == 0 {
		for i := range b {
			b[i] = r.Byte
		}
	} else {
		pattern(b, r.Seed)
	}
	return none{}, nil
})

// opMemCheck compares memory with a pattern, or with one byte if Seed is 0; it returns what differs, or "".
var opMemCheck = newOp("check memory", func(h *host, r memRange) (string, error) {
	b, err := h.bytes(r, r.N)
	if err != nil {
		return "", err
	}
	want := bytes.Repeat([]byte{r.Byte}, r.N)
	if r.Seed != 0 {
		pattern(want, r.Seed)
	}
	return firstDifference(b, want), nil
})

func firstDifference(got, want []byte) string {
	if len(got) != len(want) {
		return fmt.Sprintf("%d bytes, want %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return ""
	}
	first, count := -1, 0
	for i := range got {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			count++
		}
	}
	end := min(first+16, len(got))
	return fmt.Sprintf("%d of %d bytes differ, the first at %d: got % x, want % x", count, len(got), first, got[first:end], want[first:end])
}

type cqArgs struct {
	Entries int
	Channel handle
}

type cqInfo struct {
	H       handle
	Entries int
}

var opCQ = newOp("create_cq", func(h *host, a cqArgs) (cqInfo, error) {
	c, err := h.context()
	if err != nil {
		return cqInfo{}, err
	}
	cfg := verbs.CQConfig{Entries: a.Entries}
	if a.Channel != 0 {
		if cfg.Channel, err = get[*verbs.CompChannel](h, a.Channel); err != nil {
			return cqInfo{}, err
		}
	}
	cq, err := c.NewCQ(cfg)
	if err != nil {
		return cqInfo{}, err
	}
	return cqInfo{h.add(cq), cq.Entries()}, nil
})

var opChannel = newOp("create_comp_channel", func(h *host, _ none) (handle, error) {
	c, err := h.context()
	if err != nil {
		return 0, err
	}
	ch, err := c.NewCompChannel()
	if err != nil {
		return 0, err
	}
	return h.add(ch), nil
})

type pollArgs struct {
	CQ   handle
	N    int
	Wait time.Duration // until N have come; what came is returned in any case
}

// waitFor repeats f until it reports true or d is over; it gives way to whoever has work.
func (h *host) waitFor(d time.Duration, f func() bool) bool {
	if h.sim != nil {
		return h.sim.Poll(d, f)
	}
	deadline := time.Now().Add(d)
	for i := 0; ; i++ {
		if f() {
			return true
		}
		if i < 200 {
			runtime.Gosched()
			continue
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(min(time.Duration(i)*time.Microsecond, time.Millisecond))
	}
}

func (h *host) poll(cq *verbs.CQ, n int, wait time.Duration) (wcs []ib.WC, err error) {
	buf := make([]ib.WC, n)
	got := 0
	h.waitFor(wait, func() bool {
		var k int
		k, err = cq.Poll(buf[got:])
		if err == nil {
			got += k
		}
		return got == n || err != nil
	})
	return buf[:got], err
}

var opPoll = newOp("poll_cq", func(h *host, a pollArgs) ([]ib.WC, error) {
	return use(h, a.CQ, func(cq *verbs.CQ) ([]ib.WC, error) { return h.poll(cq, a.N, a.Wait) })
})

type armArgs struct {
	CQ            handle
	SolicitedOnly bool
}

var opArm = newOp("req_notify_cq", func(h *host, a armArgs) (none, error) {
	return use(h, a.CQ, func(cq *verbs.CQ) (none, error) { return none{}, cq.Arm(a.SolicitedOnly) })
})

type resizeArgs struct {
	CQ      handle
	Entries int
}

var opResize = newOp("resize_cq", func(h *host, a resizeArgs) (int, error) {
	return use(h, a.CQ, func(cq *verbs.CQ) (int, error) {
		err := cq.Resize(a.Entries)
		return cq.Entries(), err
	})
})

type waitArgs struct {
	H    handle
	Wait time.Duration
}

// opChannelWait returns the handle of the CQ whose event came.
var opChannelWait = newOp("get_cq_event", func(h *host, a waitArgs) (handle, error) {
	return use(h, a.H, func(ch *verbs.CompChannel) (handle, error) {
		ctx, cancel := h.timeout(a.Wait)
		defer cancel()
		cq, err := ch.Wait(ctx)
		if err != nil {
			return 0, err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		for n, o := range h.objects {
			if o == object(cq) {
				return n, nil
			}
		}
		return 0, fmt.Errorf("event for a CQ that is not ours: %p", cq)
	})
})

type asyncEvent struct {
	Type   ib.EventType
	QPN    ib.QPN
	Object handle // 0 if the event names none of ours
}

var opAsync = newOp("get_async_event", func(h *host, a waitArgs) (asyncEvent, error) {
	c, err := h.context()
	if err != nil {
		return asyncEvent{}, err
	}
	ctx, cancel := h.timeout(a.Wait)
	defer cancel()
	ev, err := c.AsyncEvent(ctx)
	if err != nil {
		return asyncEvent{}, err
	}
	e := asyncEvent{Type: ev.Type, QPN: ev.QPN}
	h.mu.Lock()
	defer h.mu.Unlock()
	for n, o := range h.objects {
		if ev.Object == any(o) {
			e.Object = n
		}
	}
	return e, nil
})

type qpArgs struct {
	PD, SendCQ, RecvCQ, SRQ handle
	Config                  qp.Config // without the objects
}

type qpInfo struct {
	H   handle
	QPN ib.QPN
	Cap ib.QPCap
}

var opQP = newOp("create_qp", func(h *host, a qpArgs) (qpInfo, error) {
	pd, err := get[*verbs.PD](h, a.PD)
	if err != nil {
		return qpInfo{}, err
	}
	cfg := a.Config
	if cfg.SendCQ, err = get[*verbs.CQ](h, a.SendCQ); err != nil {
		return qpInfo{}, err
	}
	if cfg.RecvCQ, err = get[*verbs.CQ](h, a.RecvCQ); err != nil {
		return qpInfo{}, err
	}
	if a.SRQ != 0 {
		if cfg.SRQ, err = get[*qp.SRQ](h, a.SRQ); err != nil {
			return qpInfo{}, err
		}
	}
	q, err := qp.New(pd, &cfg)
	if err != nil {
		return qpInfo{}, err
	}
	return qpInfo{h.add(q), q.QPN(), q.Cap()}, nil
})

type modifyArgs struct {
	QP   handle
	Attr ib.QPAttr
	Mask ib.QPAttrMask
}

var opModify = newOp("modify_qp", func(h *host, a modifyArgs) (none, error) {
	return use(h, a.QP, func(q *qp.QP) (none, error) {
		ctx, cancel := h.timeout(patience)
		defer cancel()
		return none{}, q.Modify(ctx, &a.Attr, a.Mask)
	})
})

type qpStatus struct {
	Attr ib.QPAttr
	Path string
}

var opQuery = newOp("query_qp", func(h *host, n handle) (qpStatus, error) {
	return use(h, n, func(q *qp.QP) (qpStatus, error) {
		attr, err := q.Query()
		return qpStatus{attr, q.Path()}, err
	})
})

// opWaitState waits until the QP is in a state; it returns the last one seen.
type stateArgs struct {
	QP    handle
	State ib.QPState
	Wait  time.Duration
}

var opWaitState = newOp("wait for state", func(h *host, a stateArgs) (ib.QPState, error) {
	return use(h, a.QP, func(q *qp.QP) (s ib.QPState, err error) {
		h.waitFor(a.Wait, func() bool {
			var attr ib.QPAttr
			attr, err = q.Query()
			s = attr.State
			return err != nil || s == a.State
		})
		return s, err
	})
})

type sendArgs struct {
	QP  handle
	WRs []ib.SendWR
}

type recvArgs struct {
	H   handle
	WRs []ib.RecvWR
}

// A posted is a count that is valid with an error, too.
var opPostSend = newOp("post_send", func(h *host, a sendArgs) (int, error) {
	return use(h, a.QP, func(q *qp.QP) (int, error) { return q.PostSend(a.WRs) })
})

var opPostRecv = newOp("post_recv", func(h *host, a recvArgs) (int, error) {
	return use(h, a.H, func(q *qp.QP) (int, error) { return q.PostRecv(a.WRs) })
})

type srqArgs struct {
	PD         handle
	Depth, SGE int
}

var opSRQ = newOp("create_srq", func(h *host, a srqArgs) (handle, error) {
	return use(h, a.PD, func(pd *verbs.PD) (handle, error) {
		s, err := qp.NewSRQ(pd, qp.SRQConfig{Depth: a.Depth, SGE: a.SGE})
		if err != nil {
			return 0, err
		}
		return h.add(s), nil
	})
})

var opSRQPostRecv = newOp("post_srq_recv", func(h *host, a recvArgs) (int, error) {
	return use(h, a.H, func(s *qp.SRQ) (int, error) { return s.PostRecv(a.WRs) })
})

type limitArgs struct {
	SRQ   handle
	Limit int
}

var opSRQLimit = newOp("modify_srq", func(h *host, a limitArgs) (none, error) {
	return use(h, a.SRQ, func(s *qp.SRQ) (none, error) { return none{}, s.SetLimit(a.Limit) })
})

type ahArgs struct {
	PD   handle
	Attr ib.AHAttr
}

type ahInfo struct {
	H   handle
	Num ib.AHNum
}

var opAH = newOp("create_ah", func(h *host, a ahArgs) (ahInfo, error) {
	return use(h, a.PD, func(pd *verbs.PD) (ahInfo, error) {
		ah, err := pd.NewAH(a.Attr)
		if err != nil {
			return ahInfo{}, err
		}
		return ahInfo{h.add(ah), ah.Num()}, nil
	})
})

var opWindow = newOp("alloc_mw", func(h *host, pd handle) (handle, error) {
	return use(h, pd, func(pd *verbs.PD) (handle, error) {
		w, err := mr.NewWindow(pd)
		if err != nil {
			return 0, err
		}
		return h.add(w), nil
	})
})

type bindArgs struct {
	Window, Mem handle
	Off, N      int
	Access      ib.Access
}

var opBindWR = newOp("bind request", func(h *host, a bindArgs) (ib.SendWR, error) {
	m, err := get[*mr.MR](h, a.Mem)
	if err != nil {
		return ib.SendWR{}, err
	}
	return use(h, a.Window, func(w *mr.Window) (ib.SendWR, error) { return w.BindWR(m, a.Off, a.N, a.Access), nil })
})

var opWindowRKey = newOp("window's rkey", func(h *host, n handle) (ib.RKey, error) {
	return use(h, n, func(w *mr.Window) (ib.RKey, error) { return w.RKey(), nil })
})
