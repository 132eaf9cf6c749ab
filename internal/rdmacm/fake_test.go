package rdmacm

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

// fakeKernel plays the kernel: it reads commands at the offsets of the kernel's header, keeps IDs, connects them with one
// another, and reports events. It is deliberately not written with the structs that the package uses.
type fakeKernel struct {
	iwarp bool // the devices' flavour

	mu      sync.Mutex
	arrived sync.Cond
	closed  bool
	ids     map[uint32]*fakeID
	nums    uint32
	events  []fakeEvent
	silent  map[uint32]bool          // commands that lead to no event
	refuse  map[uint32]error         // commands that fail
	hold    map[uint32]chan struct{} // commands that wait for this
	held    map[uint32]chan struct{} // told when such a one waits
	broken  []error                  // what GET_EVENT returns before anything else
	log     []string
}

type fakeID struct {
	num       uint32
	uid       uint64
	ud        bool
	accepted  bool // its uid is known
	port      uint16
	dst       []byte // sockaddr
	listening bool
	peer      *fakeID
	connected bool
}

// A fakeEvent is an event in the queue. For a request, made is the ID that goes with it.
type fakeEvent struct {
	to   *fakeID
	made *fakeID
	b    [eventSize]byte
}

func newFake() *fakeKernel {
	k := &fakeKernel{ids: map[uint32]*fakeID{}, silent: map[uint32]bool{}, refuse: map[uint32]error{},
		hold: map[uint32]chan struct{}{}, held: map[uint32]chan struct{}{}, nums: 40}
	k.arrived.L = &k.mu
	return k
}

// fakeChannel is a channel on a fake kernel. When the test is over, no ID may be left in it.
func fakeChannel(t testing.TB) (*fakeKernel, *Channel) {
	k := newFake()
	c := newChannel(k)
	t.Cleanup(func() {
		testutil.Eventually(t, "no ID is left", func() bool { return len(k.left()) == 0 })
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return k, c
}

// left lists the IDs that nobody has destroyed.
func (k *fakeKernel) left() (nums []uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for n := range k.ids {
		nums = append(nums, n)
	}
	slices.Sort(nums)
	return nums
}

var le = binary.NativeEndian

// eventOf builds an event: param is the union's bytes.
func eventOf(uid uint64, num uint32, kind EventType, status int32, param []byte) (b [eventSize]byte) {
	le.PutUint64(b[0:], uid)
	le.PutUint32(b[8:], num)
	le.PutUint32(b[12:], uint32(kind))
	le.PutUint32(b[16:], uint32(status))
	copy(b[20:324], param)
	return b
}

// report queues an event for an ID. The lock is held.
func (k *fakeKernel) report(to *fakeID, kind EventType, status int32, param []byte) {
	if to == nil || k.ids[to.num] != to || !to.accepted {
		return // as the kernel drops events of requests that were not accepted
	}
	k.events = append(k.events, fakeEvent{to: to, b: eventOf(to.uid, to.num, kind, status, param)})
	k.arrived.Broadcast()
}

// inject queues an event of any content.
func (k *fakeKernel) inject(b [eventSize]byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.events = append(k.events, fakeEvent{b: b})
	k.arrived.Broadcast()
}

// tell queues an event for the ID of a number.
func (k *fakeKernel) tell(num uint32, kind EventType, status int32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.report(k.ids[num], kind, status, nil)
}

// breakEvents makes the next GET_EVENT fail.
func (k *fakeKernel) breakEvents(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.broken = append(k.broken, err)
	k.arrived.Broadcast()
}

func (k *fakeKernel) event(b []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for len(k.events) == 0 && len(k.broken) == 0 && !k.closed {
		k.arrived.Wait()
	}
	if k.closed {
		return errClosed
	}
	if len(k.broken) > 0 {
		err := k.broken[0]
		k.broken = k.broken[1:]
		return err
	}
	e := k.events[0]
	k.events = k.events[1:]
	if e.made != nil {
		k.ids[e.made.num] = e.made
	}
	copy(b, e.b[:])
	return nil
}

func (k *fakeKernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	clear(k.ids)
	k.arrived.Broadcast()
	return nil
}

// count is how many commands of a kind there were.
func (k *fakeKernel) count(op string) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range k.log {
		if l == op {
			n++
		}
	}
	return n
}

// stopAt makes commands of a code wait until release is called, and waiting tells when one does.
func (k *fakeKernel) stopAt(code uint32) (waiting <-chan struct{}, release func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	hold, held := make(chan struct{}), make(chan struct{}, 100)
	k.hold[code], k.held[code] = hold, held
	return held, sync.OnceFunc(func() { close(hold) })
}

func (k *fakeKernel) set(m map[uint32]bool, code uint32, v bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	m[code] = v
}

func (k *fakeKernel) refuseWith(code uint32, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refuse[code] = err
}

func (k *fakeKernel) do(c *command) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if hold := k.hold[c.code]; hold != nil {
		k.held[c.code] <- struct{}{}
		k.mu.Unlock()
		<-hold
		k.mu.Lock()
	}
	if k.closed {
		return errClosed
	}
	k.log = append(k.log, c.op)
	if err := k.refuse[c.code]; err != nil {
		return err
	}
	if c.code == abi.RDMA_USER_CM_CMD_CREATE_ID {
		k.nums++
		id := &fakeID{num: k.nums, uid: le.Uint64(c.in), ud: le.Uint16(c.in[16:]) == 0x111, accepted: true}
		if id.uid == 0 {
			return syscall.EINVAL
		}
		k.ids[id.num] = id
		le.PutUint32(c.ref, id.num)
		return nil
	}
	at, ok := map[uint32]int{
		abi.RDMA_USER_CM_CMD_DESTROY_ID: 8, abi.RDMA_USER_CM_CMD_CONNECT: 272, abi.RDMA_USER_CM_CMD_ACCEPT: 280,
		abi.RDMA_USER_CM_CMD_INIT_QP_ATTR: 8, abi.RDMA_USER_CM_CMD_QUERY: 8, abi.RDMA_USER_CM_CMD_SET_OPTION: 8,
	}[c.code]
	if !ok {
		at = 0
	}
	id := k.ids[le.Uint32(c.in[at:])]
	if id == nil {
		return syscall.ENOENT
	}
	return k.run(c, id)
}

// run does a command of an ID.
func (k *fakeKernel) run(c *command, id *fakeID) error {
	loud := !k.silent[c.code]
	switch c.code {
	case abi.RDMA_USER_CM_CMD_DESTROY_ID:
		k.destroy(id)
	case abi.RDMA_USER_CM_CMD_BIND:
		id.port = uint16(c.in[10])<<8 | uint16(c.in[11])
		if id.port == 0 {
			id.port = 10000 + uint16(id.num)
		}
	case abi.RDMA_USER_CM_CMD_RESOLVE_ADDR:
		id.dst = slices.Clone(c.in[144:160])
		if loud {
			k.report(id, EventAddrResolved, 0, nil)
		}
	case abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE:
		if id.dst == nil {
			return syscall.EINVAL
		}
		if loud {
			k.report(id, EventRouteResolved, 0, nil)
		}
	case abi.RDMA_USER_CM_CMD_QUERY:
		b := c.ref
		clear(b)
		copy(b[0:], []byte{2, 0, 0, 0xff, 0xfe, 0, 0, 1})
		b[8] = 1
		le.PutUint16(b[12:], 16)
		le.PutUint16(b[16:], 2)
		b[18], b[19] = byte(id.port>>8), byte(id.port)
		copy(b[20:], []byte{10, 77, 0, 1})
		if id.dst != nil {
			le.PutUint16(b[14:], 16)
			copy(b[144:], id.dst)
		}
		le.PutUint32(b[272:], 5)
	case abi.RDMA_USER_CM_CMD_LISTEN:
		id.listening = true
	case abi.RDMA_USER_CM_CMD_CONNECT:
		if c.in[271] != 1 {
			return syscall.EINVAL
		}
		if loud {
			k.connect(id, c.in[:272])
		}
	case abi.RDMA_USER_CM_CMD_ACCEPT:
		return k.accept(c, id, loud)
	case abi.RDMA_USER_CM_CMD_REJECT:
		var param [272]byte
		copy(param[8:], c.in[8:8+256])
		param[264] = 148
		status := int32(28)
		if k.iwarp {
			param[264], status = c.in[4], -int32(syscall.ECONNRESET)
		}
		k.report(id.peer, EventRejected, status, param[:])
		k.part(id)
	case abi.RDMA_USER_CM_CMD_DISCONNECT:
		if id.peer == nil {
			return nil
		}
		peer := id.peer
		k.part(id)
		for _, x := range []*fakeID{peer, id} {
			k.report(x, EventDisconnected, 0, nil)
			k.report(x, EventTimewaitExit, 0, nil)
		}
	case abi.RDMA_USER_CM_CMD_NOTIFY:
		if le.Uint32(c.in[4:]) != 4 {
			return syscall.EINVAL
		}
		k.report(id, EventEstablished, 0, nil)
	case abi.RDMA_USER_CM_CMD_INIT_QP_ATTR:
		le.PutUint32(c.ref[0:], 1|1<<21)
		le.PutUint32(c.ref[4:], le.Uint32(c.in[12:]))
	case abi.RDMA_USER_CM_CMD_SET_OPTION:
		k.log = append(k.log, fmt.Sprintf("option %d = %x", le.Uint32(c.in[16:]), c.ref))
	default:
		return syscall.ENOSYS
	}
	return nil
}

// connect carries a request to whoever listens.
func (k *fakeKernel) connect(id *fakeID, param []byte) {
	port := uint16(id.dst[2])<<8 | uint16(id.dst[3])
	for _, l := range k.ids {
		if !l.listening || l.port != port || l.ud != id.ud {
			continue
		}
		k.nums++
		child := &fakeID{num: k.nums, ud: id.ud, port: port, peer: id, dst: []byte{2, 0, 0, 9, 10, 77, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0}}
		id.peer = child
		p := slices.Clone(param)
		if id.ud {
			clear(p)
			copy(p[40:], param[8:8+180])
			p = append(p, make([]byte, 32)...)
			p[296] = 180
		} else if !k.iwarp {
			p[264] = 56
		}
		k.events = append(k.events, fakeEvent{to: l, made: child, b: eventOf(l.uid, child.num, EventConnectRequest, 0, p)})
		k.arrived.Broadcast()
		return
	}
	switch {
	case id.ud:
		k.report(id, EventUnreachable, 1, nil)
	case k.iwarp:
		k.report(id, EventRejected, -int32(syscall.ECONNREFUSED), nil)
	default:
		k.report(id, EventRejected, 8, make([]byte, 272))
	}
}

func (k *fakeKernel) accept(c *command, id *fakeID, loud bool) error {
	if id.peer == nil {
		return syscall.EINVAL
	}
	param := slices.Clone(c.in[8:280])
	if param[271] == 0 { // the active side confirms
		id.connected, id.peer.connected = true, true
		k.report(id.peer, EventEstablished, 0, nil)
		return nil
	}
	id.uid, id.accepted = le.Uint64(c.in), true
	if !loud {
		return nil
	}
	switch {
	case id.ud:
		p := make([]byte, 304)
		copy(p, param[:4])
		le.PutUint32(p[4:], uint32(UDPQKey))
		copy(p[40:], param[8:8+136])
		p[296] = 136
		k.report(id.peer, EventEstablished, 0, p)
	case k.iwarp:
		id.connected, id.peer.connected = true, true
		k.report(id.peer, EventEstablished, 0, param)
		k.report(id, EventEstablished, 0, nil)
	default:
		param[264] = 196
		k.report(id.peer, EventConnectResponse, 0, param)
	}
	return nil
}

func (k *fakeKernel) part(id *fakeID) {
	if id.peer != nil {
		id.peer.peer = nil
		id.peer = nil
	}
}

// destroy ends an ID: its peer hears of it, events that were not taken are dropped, and requests among them rejected.
func (k *fakeKernel) destroy(id *fakeID) {
	delete(k.ids, id.num)
	if peer := id.peer; peer != nil {
		k.part(id)
		switch {
		case id.connected:
			k.report(peer, EventDisconnected, 0, nil)
		case k.iwarp:
			k.report(peer, EventRejected, -int32(syscall.ECONNRESET), nil)
		case !id.ud:
			k.report(peer, EventRejected, 28, make([]byte, 272))
		}
	}
	rest := k.events[:0]
	var requests []*fakeID
	for _, e := range k.events {
		switch {
		case e.to == nil || e.to != id:
			rest = append(rest, e)
		case e.made != nil:
			requests = append(requests, e.made)
		}
	}
	k.events = rest
	for _, r := range requests {
		k.destroy(r)
	}
}
