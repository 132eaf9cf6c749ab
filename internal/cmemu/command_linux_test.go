package cmemu

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/softnic/cm"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// arena is the memory of a client that writes commands by hand.
type arena struct {
	mu sync.Mutex
	b  [4096]byte
}

const arenaAt = 0x10000

var errNoMemory = errors.New("no memory there")

func (a *arena) move(n int, va uint64, f func([]byte)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if va < arenaAt || va > arenaAt+uint64(len(a.b)-n) {
		return errNoMemory
	}
	f(a.b[va-arenaAt:][:n])
	return nil
}

func (a *arena) ReadAt(b []byte, va uint64) error {
	return a.move(len(b), va, func(m []byte) { copy(b, m) })
}

func (a *arena) WriteAt(b []byte, va uint64) error {
	return a.move(len(b), va, func(m []byte) { copy(m, b) })
}

// A raw is a client that writes commands by hand.
type raw struct {
	t   testing.TB
	c   *Channel
	mem *arena
}

func newRaw(t testing.TB, m *Manager) *raw {
	t.Helper()
	r := &raw{t: t, mem: &arena{}}
	var err error
	if r.c, err = m.Open(r.mem); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.c.Close() })
	return r
}

// run writes a command, whose response has room for out bytes.
func (r *raw) run(cmd uint32, in []byte, out int) syscall.Errno {
	b := append(bytes.Clone(bytesOf(&abi.CMCmdHdr{Cmd: cmd, In: uint16(len(in)), Out: uint16(out)})), in...)
	return r.c.Write(b, r.file)
}

// file knows the channel by the number 7, and a file that is none by 8.
func (r *raw) file(fd int) (*Channel, bool) {
	if fd == 7 {
		return r.c, true
	}
	return nil, fd == 8
}

func (r *raw) must(errno syscall.Errno) {
	r.t.Helper()
	if errno != 0 {
		r.t.Fatal(errno)
	}
}

func (r *raw) create(uid uint64) uint32 {
	r.t.Helper()
	r.must(r.run(abi.RDMA_USER_CM_CMD_CREATE_ID, bytesOf(&abi.CMCreateID{UID: uid, Response: arenaAt, PS: abi.RDMA_PS_TCP}), 4))
	return native.Uint32(r.mem.b[:])
}

// destroy returns how many events of the ID were delivered.
func (r *raw) destroy(id uint32) uint32 {
	r.t.Helper()
	r.must(r.run(abi.RDMA_USER_CM_CMD_DESTROY_ID, bytesOf(&abi.CMDestroyID{ID: id, Response: arenaAt}), 4))
	return native.Uint32(r.mem.b[:])
}

func (r *raw) bind(id uint32, a string) syscall.Errno {
	q := abi.CMBind{ID: id}
	x := sockaddrOf(netip.MustParseAddrPort(a))
	q.AddrSize = uint16(x.put(bytesOf(&q.Addr)))
	return r.run(abi.RDMA_USER_CM_CMD_BIND, bytesOf(&q), 0)
}

func (r *raw) resolve(id uint32, dst string) syscall.Errno {
	q := abi.CMResolveAddr{ID: id, TimeoutMs: 1000}
	x := sockaddrOf(netip.MustParseAddrPort(dst))
	q.DstSize = uint16(x.put(bytesOf(&q.DstAddr)))
	return r.run(abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, bytesOf(&q), 0)
}

func (r *raw) route(id uint32) syscall.Errno {
	return r.run(abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE, bytesOf(&abi.CMResolveRoute{ID: id, TimeoutMs: 1}), 0)
}

func (r *raw) listen(id, backlog uint32) syscall.Errno {
	return r.run(abi.RDMA_USER_CM_CMD_LISTEN, bytesOf(&abi.CMListen{ID: id, Backlog: backlog}), 0)
}

var qpns atomic.Uint32

// nextQPN is the number of a queue pair that nobody has: managers do not look.
func nextQPN() uint32 { return 0x1000 + qpns.Add(1) }

func (r *raw) connect(id uint32, change func(*abi.CMConnect)) syscall.Errno {
	q := abi.CMConnect{ID: id, ConnParam: abi.CMConnParam{QPNum: nextQPN(), Valid: 1, ResponderResources: 2, InitiatorDepth: 3, RetryCount: 7, RNRRetryCount: 6}}
	if change != nil {
		change(&q)
	}
	return r.run(abi.RDMA_USER_CM_CMD_CONNECT, bytesOf(&q), 0)
}

// accept answers a request, which gets the name uid; with 0, it confirms an answer.
func (r *raw) accept(id uint32, uid uint64, change func(*abi.CMAccept)) syscall.Errno {
	q := abi.CMAccept{ID: id, UID: uid}
	if uid != 0 {
		q.ConnParam = abi.CMConnParam{QPNum: nextQPN(), Valid: 1, ResponderResources: 1, InitiatorDepth: 2, RNRRetryCount: 5}
	}
	if change != nil {
		change(&q)
	}
	return r.run(abi.RDMA_USER_CM_CMD_ACCEPT, bytesOf(&q), 0)
}

func (r *raw) reject(id uint32, reason, n uint8) syscall.Errno {
	return r.run(abi.RDMA_USER_CM_CMD_REJECT, bytesOf(&abi.CMReject{ID: id, Reason: reason, PrivateDataLen: n}), 0)
}

func (r *raw) disconnect(id uint32) syscall.Errno {
	return r.run(abi.RDMA_USER_CM_CMD_DISCONNECT, bytesOf(&abi.CMDisconnect{ID: id}), 0)
}

func (r *raw) notify(id uint32) syscall.Errno {
	return r.run(abi.RDMA_USER_CM_CMD_NOTIFY, bytesOf(&abi.CMNotify{ID: id, Event: uint32(ib.EventCommEst)}), 0)
}

func (r *raw) attr(id uint32, state ib.QPState) (abi.QPAttr, syscall.Errno) {
	errno := r.run(abi.RDMA_USER_CM_CMD_INIT_QP_ATTR, bytesOf(&abi.CMInitQPAttr{ID: id, QPState: uint32(state), Response: arenaAt}), 144)
	return structOf[abi.QPAttr](r.mem.b[:]), errno
}

func (r *raw) query(id, option uint32, n int) []byte {
	r.t.Helper()
	clear(r.mem.b[:])
	r.must(r.run(abi.RDMA_USER_CM_CMD_QUERY, bytesOf(&abi.CMQuery{ID: id, Option: option, Response: arenaAt}), n))
	return bytes.Clone(r.mem.b[:n])
}

func (r *raw) queryRoute(id uint32) []byte {
	r.t.Helper()
	const n = 208
	r.must(r.run(abi.RDMA_USER_CM_CMD_QUERY_ROUTE, bytesOf(&abi.CMQuery{ID: id, Response: arenaAt}), n))
	return bytes.Clone(r.mem.b[:n])
}

func (r *raw) option(id, level, name uint32, v []byte) syscall.Errno {
	copy(r.mem.b[2048:], v)
	return r.run(abi.RDMA_USER_CM_CMD_SET_OPTION, bytesOf(&abi.CMSetOption{ID: id, Level: level, Optname: name, Optlen: uint32(len(v)), Optval: arenaAt + 2048}), 0)
}

// poll takes an event, if there is one.
func (r *raw) poll() (abi.CMEventResp, syscall.Errno) {
	errno := r.run(abi.RDMA_USER_CM_CMD_GET_EVENT, bytesOf(&abi.CMGetEvent{Response: arenaAt}), 336)
	return structOf[abi.CMEventResp](r.mem.b[:]), errno
}

// event takes the next event, which is of a kind.
func (r *raw) event(uid uint64, kind uint32, status int32) abi.CMEventResp {
	r.t.Helper()
	for end := time.After(testutil.Patience); ; {
		e, errno := r.poll()
		if errno == 0 {
			if e.UID != uid || e.Event != kind || int32(e.Status) != status {
				r.t.Fatalf("event %d of %#x, status %d; want %d of %#x, %d", e.Event, e.UID, int32(e.Status), kind, uid, status)
			}
			return e
		}
		if errno != unix.EAGAIN {
			r.t.Fatal(errno)
		}
		select {
		case <-r.c.Ready():
		case <-end:
			r.t.Fatalf("no event %d of %#x", kind, uid)
		}
	}
}

// waiting waits until there are n events.
func (r *raw) waiting(n int) {
	r.t.Helper()
	testutil.Eventually(r.t, "events", func() bool {
		r.c.m.mu.Lock()
		defer r.c.m.mu.Unlock()
		return len(r.c.events) == n
	})
}

func (r *raw) quiet() {
	r.t.Helper()
	if e, errno := r.poll(); errno != unix.EAGAIN {
		r.t.Errorf("event %d of %#x, %v", e.Event, e.UID, errno)
	}
}

func conn(e *abi.CMEventResp) abi.CMConnParam {
	return structOf[abi.CMConnParam](bytesOf(e)[abi.CMEventRespConnOffset:])
}

// listener returns a listener with the name 1, and its address.
func (r *raw) listener(backlog uint32) (uint32, string) {
	r.t.Helper()
	l := r.create(1)
	r.must(r.bind(l, "127.0.0.1:0"))
	r.must(r.listen(l, backlog))
	return l, r.local(l)
}

func (r *raw) local(id uint32) string {
	r.t.Helper()
	q := structOf[abi.CMQueryAddrResp](r.query(id, abi.RDMA_USER_CM_QUERY_ADDR, 280))
	a, _ := readSockaddr(bytesOf(&q.SrcAddr))
	return a.addrPort().String()
}

// route to dst, of an ID with the name uid.
func (r *raw) routed(uid uint64, dst string) uint32 {
	r.t.Helper()
	id := r.create(uid)
	r.must(r.resolve(id, dst))
	r.event(uid, eventAddrResolved, 0)
	r.must(r.route(id))
	r.event(uid, eventRouteResolved, 0)
	return id
}

// connected returns both ends of a connection to the listener: named 2 and 3.
func (r *raw) connected(dst string) (active, passive uint32) {
	r.t.Helper()
	active = r.routed(2, dst)
	r.must(r.connect(active, nil))
	passive = r.event(1, eventConnectRequest, 0).ID
	r.must(r.accept(passive, 3, nil))
	r.event(2, eventConnectResponse, 0)
	r.must(r.accept(active, 0, nil))
	r.event(3, eventEstablished, 0)
	return active, passive
}

// Commands that are none, and those that come out of order.
func TestErrors(t *testing.T) {
	m := newManager(t)
	r, other := newRaw(t, m), newRaw(t, m)
	l, at := r.listener(0)
	idle, bound, routed := r.create(4), r.create(5), r.routed(6, at)
	r.must(r.bind(bound, "127.0.0.1:0"))
	active, passive := r.connected(at)
	long := func(q *abi.CMConnect) { q.ConnParam.PrivateDataLen = cm.MaxRequest + 1 }
	create := func(space uint16, out int, at uint64) syscall.Errno {
		return r.run(abi.RDMA_USER_CM_CMD_CREATE_ID, bytesOf(&abi.CMCreateID{UID: 9, Response: at, PS: space}), out)
	}
	query := func(option uint32, out int) syscall.Errno {
		return r.run(abi.RDMA_USER_CM_CMD_QUERY, bytesOf(&abi.CMQuery{ID: idle, Option: option, Response: arenaAt}), out)
	}
	migrate := func(fd uint32, id uint32) syscall.Errno {
		return r.run(abi.RDMA_USER_CM_CMD_MIGRATE_ID, bytesOf(&abi.CMMigrateID{ID: id, FD: fd, Response: arenaAt}), 4)
	}
	spaceIB := func() syscall.Errno {
		if errno := create(abi.RDMA_PS_IB, 4, arenaAt); errno != 0 {
			return errno
		}
		return r.bind(native.Uint32(r.mem.b[:]), "127.0.0.1:0")
	}
	attr := func(id uint32, s ib.QPState) syscall.Errno {
		_, errno := r.attr(id, s)
		return errno
	}
	ibAddr := abi.CMBind{ID: idle, AddrSize: sizeofSockaddrIB}
	native.PutUint16(bytesOf(&ibAddr.Addr), afIB)
	bytesOf(&ibAddr.Addr)[8] = 1
	for name, x := range map[string]struct{ got, want syscall.Errno }{
		"nothing":                  {r.c.Write(nil, nil), unix.EINVAL},
		"no such command":          {r.run(23, nil, 0), unix.EINVAL},
		"GET_OPTION":               {r.run(abi.RDMA_USER_CM_CMD_GET_OPTION, nil, 0), unix.ENOSYS},
		"header beyond the end":    {r.c.Write(bytesOf(&abi.CMCmdHdr{In: 1}), nil), unix.EINVAL},
		"short":                    {r.run(abi.RDMA_USER_CM_CMD_LISTEN, make([]byte, 7), 0), unix.EINVAL},
		"port space":               {create(0x107, 4, arenaAt), unix.EINVAL},
		"datagrams":                {create(abi.RDMA_PS_IPOIB, 4, arenaAt), unix.EPROTONOSUPPORT},
		"bind, space of IB":        {spaceIB(), unix.EPROTONOSUPPORT},
		"create, no room":          {create(abi.RDMA_PS_TCP, 3, arenaAt), unix.ENOSPC},
		"create, no memory":        {create(abi.RDMA_PS_TCP, 4, 0), unix.EFAULT},
		"no ID":                    {r.listen(99, 0), unix.ENOENT},
		"another's ID":             {other.listen(l, 0), unix.EINVAL},
		"bind twice":               {r.bind(bound, "127.0.0.1:0"), unix.EINVAL},
		"bind, nobody's":           {r.bind(idle, "192.0.2.1:0"), unix.ENODEV},
		"bind, AF_IB":              {r.run(abi.RDMA_USER_CM_CMD_BIND, bytesOf(&ibAddr), 0), unix.ENODEV},
		"bind, size":               {r.run(abi.RDMA_USER_CM_CMD_BIND, bytesOf(&abi.CMBind{ID: idle, AddrSize: 16}), 0), unix.EINVAL},
		"bind, link-local":         {r.bind(idle, "[fe80::1]:0"), unix.EINVAL},
		"resolve, family":          {r.resolve(bound, "[::1]:1"), unix.EINVAL},
		"resolve, any":             {r.resolve(bound, "0.0.0.0:1"), unix.ENODEV},
		"resolve, again":           {r.resolve(routed, at), unix.EINVAL},
		"route, no address":        {r.route(bound), unix.EINVAL},
		"route, no device":         {r.route(idle), unix.EINVAL},
		"connect, no route":        {r.connect(bound, nil), unix.EINVAL},
		"connect, not valid":       {r.connect(routed, func(q *abi.CMConnect) { q.ConnParam.Valid = 0 }), unix.EINVAL},
		"connect, too long":        {r.connect(routed, long), unix.EINVAL},
		"connect again":            {r.connect(active, nil), unix.EINVAL},
		"listen, connected":        {r.listen(active, 0), unix.EINVAL},
		"listen again":             {r.listen(l, 0), unix.EINVAL},
		"accept, not asked":        {r.accept(bound, 1, nil), unix.EINVAL},
		"accept again":             {r.accept(passive, 3, nil), unix.EINVAL},
		"confirm again":            {r.accept(active, 0, nil), unix.EINVAL},
		"reject, not asked":        {r.reject(bound, 0, 0), unix.EINVAL},
		"reject, connected":        {r.reject(passive, 0, 0), unix.EINVAL},
		"reject, reason":           {r.reject(passive, 3, 0), unix.EINVAL},
		"disconnect, no conn":      {r.disconnect(bound), unix.EINVAL},
		"notify, no conn":          {r.notify(bound), unix.EINVAL},
		"notify, established":      {r.notify(passive), unix.EISCONN},
		"notify, active":           {r.notify(active), unix.EISCONN},
		"attributes, no device":    {attr(idle, ib.Init), unix.EINVAL},
		"attributes, no state":     {attr(bound, 7), unix.EINVAL},
		"attributes, SQD":          {attr(active, ib.SQD), unix.EINVAL},
		"query, option":            {query(3, 280), unix.ENOSYS},
		"query, no room":           {query(abi.RDMA_USER_CM_QUERY_ADDR, 271), unix.ENOSPC},
		"event, no room":           {r.run(abi.RDMA_USER_CM_CMD_GET_EVENT, make([]byte, 8), 323), unix.ENOSPC},
		"event, none":              {r.run(abi.RDMA_USER_CM_CMD_GET_EVENT, make([]byte, 8), 336), unix.EAGAIN},
		"option, none":             {r.option(idle, abi.RDMA_OPTION_ID, 9, []byte{1}), unix.ENOSYS},
		"option, level":            {r.option(idle, 2, 0, []byte{1}), unix.ENOSYS},
		"option, size":             {r.option(idle, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_TOS, []byte{1, 2}), unix.EINVAL},
		"option, too late":         {r.option(active, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_AFONLY, []byte{1, 0, 0, 0}), unix.EINVAL},
		"option, path":             {r.option(idle, abi.RDMA_OPTION_IB, abi.RDMA_OPTION_IB_PATH, make([]byte, 72)), unix.EINVAL},
		"option, listening":        {r.option(l, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_REUSEADDR, []byte{1, 0, 0, 0}), unix.EINVAL},
		"join":                     {r.run(abi.RDMA_USER_CM_CMD_JOIN_MCAST, bytesOf(&abi.CMJoinMcast{ID: idle, AddrSize: 16}), 4), unix.EINVAL},
		"leave":                    {r.run(abi.RDMA_USER_CM_CMD_LEAVE_MCAST, bytesOf(&abi.CMDestroyID{ID: idle}), 4), unix.ENOENT},
		"migrate, other file":      {migrate(8, idle), unix.EINVAL},
		"migrate, not open":        {migrate(9, idle), unix.ENOENT},
		"migrate, no ID":           {migrate(7, 99), unix.ENOENT},
		"migrate, no file":         {r.c.Write(append(bytesOf(&abi.CMCmdHdr{Cmd: abi.RDMA_USER_CM_CMD_MIGRATE_ID, In: 16, Out: 4}), make([]byte, 16)...), nil), unix.EBADF},
		"migrate to where it is":   {migrate(7, idle), 0},
		"destroy, no room":         {r.run(abi.RDMA_USER_CM_CMD_DESTROY_ID, bytesOf(&abi.CMDestroyID{ID: idle}), 3), unix.ENOSPC},
		"destroy, another's":       {other.run(abi.RDMA_USER_CM_CMD_DESTROY_ID, bytesOf(&abi.CMDestroyID{ID: idle, Response: arenaAt}), 4), unix.EINVAL},
		"option, its memory":       {r.run(abi.RDMA_USER_CM_CMD_SET_OPTION, bytesOf(&abi.CMSetOption{ID: idle, Optlen: 1}), 0), unix.EFAULT},
		"option, how much of that": {r.run(abi.RDMA_USER_CM_CMD_SET_OPTION, bytesOf(&abi.CMSetOption{ID: idle, Optlen: 1 << 30, Optval: arenaAt}), 0), unix.EINVAL},
	} {
		if x.got != x.want {
			t.Errorf("%s: %v, want %v", name, x.got, x.want)
		}
	}
	r.quiet()
	other.quiet()
}

// What becomes of connections, as events.
func TestEvents(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	l, at := r.listener(0)

	// Established, and ended by the active side.
	active, passive := r.connected(at)
	r.must(r.disconnect(active))
	for range 2 {
		e, errno := r.poll()
		for errno == unix.EAGAIN {
			<-r.c.Ready()
			e, errno = r.poll()
		}
		if errno != 0 || e.Event != eventDisconnected || e.UID != 2 && e.UID != 3 || e.Status != 0 {
			t.Errorf("event %d of %d, %v", e.Event, e.UID, errno)
		}
	}
	r.must(r.disconnect(passive))
	if _, errno := r.attr(active, ib.RTS); errno != unix.EINVAL {
		t.Errorf("attributes of a connection that is over: %v", errno)
	}
	for range 2 {
		e, errno := r.poll()
		for errno == unix.EAGAIN {
			<-r.c.Ready()
			e, errno = r.poll()
		}
		if e.Event != eventTimewaitExit {
			t.Errorf("event %d of %d", e.Event, e.UID)
		}
	}
	if n := r.destroy(active); n != 5 {
		t.Errorf("%d events of the active side, not 5", n)
	}
	if n := r.destroy(passive); n != 3 {
		t.Errorf("%d events of the passive side, not 3", n)
	}

	// Refused by the program, and without a listener.
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	passive = r.event(1, eventConnectRequest, 0).ID
	r.must(r.run(abi.RDMA_USER_CM_CMD_REJECT, bytesOf(&abi.CMReject{ID: passive, Reason: 35, PrivateDataLen: 2, PrivateData: [256]byte{'n', 'o'}}), 0))
	e := r.event(2, eventRejected, 35)
	if p := conn(&e); p.PrivateDataLen != 148 || string(p.PrivateData[:3]) != "no\x00" {
		t.Errorf("%+v", p)
	}
	if errno := r.accept(passive, 3, nil); errno != unix.EINVAL {
		t.Errorf("accepted what was refused: %v", errno)
	}
	r.destroy(active)
	r.destroy(passive)
	active = r.routed(2, "127.0.0.1:1")
	r.must(r.connect(active, nil))
	r.event(2, eventRejected, 8)
	r.destroy(active)

	// The request goes with its ID, and is refused so.
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	r.destroy(r.event(1, eventConnectRequest, 0).ID)
	r.event(2, eventRejected, 28)
	r.destroy(active)

	// The answer is too long, or refused by who has asked.
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	passive = r.event(1, eventConnectRequest, 0).ID
	if errno := r.accept(passive, 3, func(q *abi.CMAccept) { q.ConnParam.PrivateDataLen = cm.MaxReply + 1 }); errno != unix.EINVAL {
		t.Error(errno)
	}
	r.event(2, eventRejected, 28)
	r.destroy(active)
	r.destroy(passive)
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	passive = r.event(1, eventConnectRequest, 0).ID
	r.must(r.accept(passive, 3, nil))
	r.event(2, eventConnectResponse, 0)
	r.must(r.reject(active, 0, 5))
	r.event(3, eventRejected, 28)
	r.destroy(active)
	r.destroy(passive)

	// Whoever has asked goes: the other side hears of it once it has a name.
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	passive = r.event(1, eventConnectRequest, 0).ID
	r.must(r.accept(passive, 3, nil))
	r.event(2, eventConnectResponse, 0)
	r.destroy(active)
	r.event(3, eventRejected, 28)
	r.destroy(passive)

	// The peer's data comes before its confirmation.
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	passive = r.event(1, eventConnectRequest, 0).ID
	r.must(r.accept(passive, 3, nil))
	r.event(2, eventConnectResponse, 0)
	r.must(r.notify(passive))
	r.event(3, eventEstablished, 0)
	r.must(r.accept(active, 0, nil))
	r.destroy(active)
	r.event(3, eventDisconnected, 0)
	r.destroy(passive)

	// Requests that nobody has taken go with the listener.
	active = r.routed(2, at)
	r.must(r.connect(active, nil))
	r.waiting(1)
	if n := r.destroy(l); n != 7 {
		t.Errorf("%d events of the listener, not 7", n)
	}
	r.event(2, eventRejected, 28)
	r.destroy(active)
	r.quiet()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ids) != 0 || len(m.ports) != 0 {
		t.Errorf("%d IDs, %d ports are left", len(m.ids), len(m.ports))
	}
}

// What is said of a connection comes as the kernel tells it, the other way round.
func TestConnParams(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	_, at := r.listener(0)
	active := r.routed(2, at)
	r.must(r.option(active, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_ACK_TIMEOUT, []byte{19}))
	r.must(r.connect(active, func(q *abi.CMConnect) {
		p := &q.ConnParam
		p.QPNum, p.SRQ, p.FlowControl, p.RetryCount, p.PrivateDataLen = 0x1234, 1, 1, 9, 56
		for i := range p.PrivateData {
			p.PrivateData[i] = byte(i + 1)
		}
		q.ECE = abi.CMECE{VendorID: 0x2c9, AttrMod: 0x10000001}
	}))
	e := r.event(1, eventConnectRequest, 0)
	p := conn(&e)
	if p.QPNum != 0x1234 || p.ResponderResources != 3 || p.InitiatorDepth != 2 || p.RetryCount != 7 || p.RNRRetryCount != 6 || p.SRQ != 1 || p.FlowControl != 1 ||
		p.PrivateDataLen != 56 || p.PrivateData[55] != 56 || p.PrivateData[56] != 0 || e.ECE.VendorID != 0x2c9 || e.ECE.AttrMod != 0x10000001 {
		t.Errorf("%+v, %+v", p, e.ECE)
	}
	a, errno := r.attr(e.ID, ib.Init)
	if errno != 0 || a.QPAccessFlags != 2|4|8 || a.PortNum != 1 || a.QPState != 1 {
		t.Errorf("%+v, %v", a, errno)
	}
	a, errno = r.attr(e.ID, ib.RTR)
	if errno != 0 || a.DestQPNum != 0x1234 || a.MaxDestRdAtomic != 3 || a.PathMTU == 0 || a.AHAttr.IsGlobal != 1 {
		t.Errorf("%+v, %v", a, errno)
	}
	passivePSN := a.RQPSN
	a, errno = r.attr(e.ID, ib.RTS)
	if errno != 0 || a.MaxRdAtomic != 2 || a.RetryCnt != 7 || a.RNRRetry != 6 || a.Timeout == 0 {
		t.Errorf("%+v, %v", a, errno)
	}
	activePSN := a.SQPSN
	r.must(r.accept(e.ID, 3, func(q *abi.CMAccept) {
		q.ConnParam.QPNum, q.ConnParam.SRQ, q.ConnParam.FlowControl = 0x4321, 1, 1
		q.ECE = abi.CMECE{VendorID: cm.Vendor, AttrMod: cm.OptionSelective} // which is not the client's to say
	}))
	x := r.event(2, eventConnectResponse, 0)
	p = conn(&x)
	if p.QPNum != 0x4321 || p.ResponderResources != 2 || p.InitiatorDepth != 1 || p.RNRRetryCount != 5 || p.SRQ != 1 || p.FlowControl != 1 || p.PrivateDataLen != 196 ||
		x.ECE.VendorID != 0 || x.ECE.AttrMod != 0 {
		t.Errorf("%+v, %+v", p, x.ECE)
	}
	if a, errno = r.attr(active, ib.RTR); errno != 0 || a.DestQPNum != 0x4321 || a.MaxDestRdAtomic != 2 || a.RQPSN != activePSN {
		t.Errorf("%+v, %v", a, errno)
	}
	if a, errno = r.attr(active, ib.RTS); errno != 0 || a.MaxRdAtomic != 1 || a.RetryCnt != 7 || a.RNRRetry != 5 || a.Timeout != 19 || a.SQPSN != passivePSN {
		t.Errorf("%+v, %v", a, errno)
	}
	if a, errno = r.attr(e.ID, ib.RTR); errno != 0 || a.MaxDestRdAtomic != 1 {
		t.Errorf("%+v, %v", a, errno)
	}
}

// A listener has room for so many requests as are not delivered.
func TestBacklog(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	_, at := r.listener(1)
	first, second := r.routed(2, at), r.routed(3, at)
	r.must(r.connect(first, nil))
	r.waiting(1)
	r.must(r.connect(second, nil))
	r.waiting(2)
	taken := r.event(1, eventConnectRequest, 0)
	r.event(3, eventRejected, 28)
	again := r.routed(4, at)
	r.must(r.connect(again, nil))
	if e := r.event(1, eventConnectRequest, 0); e.ID == taken.ID {
		t.Errorf("%+v", e)
	}
}

// Ports are taken, shared and free as the kernel has it.
func TestPorts(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	on := []byte{1, 0, 0, 0}
	const port = 7471
	at := func(ip string) string { return fmt.Sprintf("%s:%d", ip, port) }
	a := r.create(1)
	r.must(r.bind(a, at("127.0.0.1")))
	for _, x := range []struct {
		at   string
		want syscall.Errno
	}{{at("127.0.0.1"), unix.EADDRINUSE}, {at("0.0.0.0"), unix.EADDRNOTAVAIL}, {"127.0.0.1:7472", 0}, {at("[::1]"), 0}} {
		b := r.create(2)
		if errno := r.bind(b, x.at); errno != x.want && !(x.at == at("[::1]") && errno == unix.ENODEV) { // where there is no IPv6
			t.Errorf("%s: %v, want %v", x.at, errno, x.want)
		}
		r.destroy(b)
	}
	r.destroy(a)

	shared := []uint32{r.create(1), r.create(2)}
	for _, id := range shared {
		r.must(r.option(id, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_REUSEADDR, on))
		r.must(r.bind(id, at("127.0.0.1")))
	}
	if errno := r.listen(shared[0], 0); errno != unix.EADDRINUSE {
		t.Errorf("two have the port, and one listens: %v", errno)
	}
	r.destroy(shared[1])
	r.must(r.listen(shared[0], 0))
	late := r.create(3)
	r.must(r.option(late, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_REUSEADDR, on))
	if errno := r.bind(late, at("127.0.0.1")); errno != unix.EADDRINUSE {
		t.Errorf("a listener shares its port: %v", errno)
	}

	// Of both families at once, if both want no other.
	v6 := r.create(4)
	r.must(r.option(v6, abi.RDMA_OPTION_ID, abi.RDMA_OPTION_ID_AFONLY, on))
	r.must(r.bind(v6, "[::]:7473"))
	v4 := r.create(5)
	r.must(r.bind(v4, "0.0.0.0:7473"))
	r.must(r.listen(v4, 0))
	r.must(r.listen(v6, 0))
	id := r.routed(6, "127.0.0.1:7473")
	r.must(r.connect(id, nil))
	r.event(5, eventConnectRequest, 0)

	// Listening without an address is at a port that nobody has chosen.
	any := r.create(7)
	r.must(r.listen(any, 0))
	p := netip.MustParseAddrPort(r.local(any)).Port()
	id = r.routed(8, fmt.Sprintf("127.0.0.1:%d", p))
	r.must(r.connect(id, nil))
	r.event(7, eventConnectRequest, 0)

	// A port that is gone can be had again at once.
	r.destroy(v4)
	v4 = r.create(5)
	r.must(r.bind(v4, "0.0.0.0:7473"))
	r.must(r.listen(v4, 0))
}

// Who listens at all addresses does so at those that come later.
func TestNewAddress(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	l := r.create(1)
	r.must(r.bind(l, "0.0.0.0:7471"))
	r.must(r.listen(l, 0))
	shell(t, "ip address add 10.97.7.7/32 dev lo")
	defer shell(t, "ip address delete 10.97.7.7/32 dev lo")
	x := m.ids[l]
	testutil.Eventually(t, "the listener is at the new address", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return slices.ContainsFunc(x.listens, func(p place) bool { return p.Addr() == netip.MustParseAddr("10.97.7.7") })
	})
	id := r.routed(2, "10.97.7.7:7471")
	r.must(r.connect(id, nil))
	r.event(1, eventConnectRequest, 0)
}

// librdmacm binds an address of InfiniBand's to see which commands the kernel has.
func TestInfiniBandAddress(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	r.must(r.run(abi.RDMA_USER_CM_CMD_CREATE_ID, bytesOf(&abi.CMCreateID{UID: 1, Response: arenaAt, PS: abi.RDMA_PS_IB, QPType: uint8(ib.RC)}), 4))
	id := native.Uint32(r.mem.b[:])
	bind := abi.CMBind{ID: id, AddrSize: sizeofSockaddrIB}
	b := bytesOf(&bind.Addr)
	native.PutUint16(b, afIB)
	binary.BigEndian.PutUint64(b[24:], abi.RDMA_PS_TCP<<16)
	binary.BigEndian.PutUint64(b[32:], 0xffffffffffff0000)
	r.must(r.run(abi.RDMA_USER_CM_CMD_BIND, bytesOf(&bind), 0))
	q := structOf[abi.CMQueryAddrResp](r.query(id, abi.RDMA_USER_CM_QUERY_ADDR, 280))
	if q.SrcSize != 48 || q.DstSize != 48 || q.SrcAddr.SSFamily != afIB || q.DstAddr.SSFamily != afIB || q.NodeGUID != 0 {
		t.Errorf("%+v", q)
	}
	r.query(id, abi.RDMA_USER_CM_QUERY_GID, 280)
	r.queryRoute(id)
	if errno := r.listen(id, 0); errno != unix.EPROTONOSUPPORT {
		t.Error(errno)
	}
	resolve := abi.CMResolveAddr{ID: id, TimeoutMs: 1, DstSize: sizeofSockaddrIB}
	native.PutUint16(bytesOf(&resolve.DstAddr), afIB)
	if errno := r.run(abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, bytesOf(&resolve), 0); errno != unix.ENODEV {
		t.Error(errno)
	}
}

// An ID goes to another channel with the events that were not delivered.
func TestMigrate(t *testing.T) {
	m := newManager(t)
	from, to := newRaw(t, m), newRaw(t, m)
	l, at := from.listener(0)
	active := to.routed(2, at)
	to.must(to.connect(active, nil))
	from.waiting(1)
	other := from.create(9)
	b := append(bytes.Clone(bytesOf(&abi.CMCmdHdr{Cmd: abi.RDMA_USER_CM_CMD_MIGRATE_ID, In: 16, Out: 4})),
		bytesOf(&abi.CMMigrateID{ID: l, FD: 5, Response: arenaAt})...)
	to.must(to.c.Write(b, func(fd int) (*Channel, bool) {
		if fd != 5 {
			t.Errorf("descriptor %d", fd)
		}
		return from.c, true
	}))
	if n := native.Uint32(to.mem.b[:]); n != 0 {
		t.Errorf("%d events were delivered", n)
	}
	from.quiet()
	passive := to.event(1, eventConnectRequest, 0).ID
	to.must(to.accept(passive, 3, nil))
	to.event(2, eventConnectResponse, 0)
	to.must(to.accept(active, 0, nil))
	to.event(3, eventEstablished, 0)
	if errno := from.listen(l, 0); errno != unix.EINVAL {
		t.Errorf("the listener is still there: %v", errno)
	}
	from.destroy(other)
	if err := from.c.Close(); err != nil {
		t.Error(err)
	}
	if n := to.destroy(l); n != 1 {
		t.Errorf("%d events, not 1", n)
	}
}

// The client's memory goes away under an event: it is there for the next try.
func TestEventStays(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	_, at := r.listener(0)
	id := r.create(2)
	r.must(r.resolve(id, at))
	for range 2 {
		if errno := r.run(abi.RDMA_USER_CM_CMD_GET_EVENT, bytesOf(&abi.CMGetEvent{Response: 8}), 336); errno != unix.EFAULT {
			t.Error(errno)
		}
	}
	r.event(2, eventAddrResolved, 0)
	if n := r.destroy(id); n != 1 {
		t.Errorf("%d events, not 1", n)
	}
	// Older programs have less room.
	id = r.create(2)
	r.must(r.resolve(id, at))
	r.mem.b[324] = 77
	r.must(r.run(abi.RDMA_USER_CM_CMD_GET_EVENT, bytesOf(&abi.CMGetEvent{Response: arenaAt}), 324))
	if r.mem.b[324] != 77 || r.mem.b[0] != 2 {
		t.Errorf("%x", r.mem.b[:336])
	}
}

// Notify says when there are events, and when there are none.
func TestNotify(t *testing.T) {
	m := newManager(t)
	r := newRaw(t, m)
	_, at := r.listener(0)
	var said []bool
	r.c.SetNotify(func(some bool) { said = append(said, some) })
	ids := []uint32{r.create(2), r.create(3)}
	for i, id := range ids {
		r.must(r.resolve(id, at))
		if len(said) != 1 || !said[0] {
			t.Errorf("after %d events: %v", i+1, said)
		}
	}
	r.event(2, eventAddrResolved, 0)
	if len(said) != 1 {
		t.Errorf("%v", said)
	}
	r.destroy(ids[1])
	if len(said) != 2 || said[1] {
		t.Errorf("%v", said)
	}
	r.quiet()
	r.must(r.route(ids[0]))
	r.c.SetNotify(func(some bool) { said = append(said, some) })
	if len(said) != 4 || !said[2] || !said[3] {
		t.Errorf("%v", said)
	}
	r.c.Close()
	if len(said) != 5 || said[4] {
		t.Errorf("%v", said)
	}
	for range 2 { // it stays so
		<-r.c.Ready()
	}
}

// A client has bounds.
func TestBounds(t *testing.T) {
	m := newManager(t)
	r, other := newRaw(t, m), newRaw(t, m)
	for range maxChannelIDs {
		r.create(1)
	}
	if errno := r.run(abi.RDMA_USER_CM_CMD_CREATE_ID, bytesOf(&abi.CMCreateID{UID: 1, Response: arenaAt, PS: abi.RDMA_PS_TCP}), 4); errno != unix.ENOMEM {
		t.Error(errno)
	}
	id := other.create(1)
	other.must(other.bind(id, "0.0.0.0:0"))
	m.mu.Lock()
	x := m.ids[id]
	for range maxEvents {
		x.queue(eventAddrError, 0, nil, abi.CMECE{})
	}
	m.mu.Unlock()
	if errno := other.resolve(id, "127.0.0.1:1"); errno != unix.ENOMEM {
		t.Error(errno)
	}
	r.c.Close()
	if other.create(2) > 1 {
		t.Error("numbers that were let go of are not given again")
	}
}

// Everything of a client goes with its channel, whatever it was at.
func TestClientGoes(t *testing.T) {
	m := newManager(t)
	r, peer := newRaw(t, m), newRaw(t, m)
	l, at := r.listener(0)
	pl := peer.create(1)
	peer.must(peer.bind(pl, "127.0.0.1:0"))
	peer.must(peer.listen(pl, 0))
	pat := peer.local(pl)
	_, _ = r.connected(at)
	open := r.routed(5, pat)
	r.must(r.connect(open, nil))
	waiting := peer.event(1, eventConnectRequest, 0).ID
	active := peer.routed(6, at)
	peer.must(peer.connect(active, nil))
	r.waiting(1)
	if err := r.c.Close(); err != nil {
		t.Error(err)
	}
	peer.event(6, eventRejected, 28)
	testutil.Eventually(t, "the peer of who asked sees that it has gone", func() bool {
		return peer.accept(waiting, 7, nil) == unix.EINVAL
	})
	for _, errno := range []syscall.Errno{r.listen(l, 0), r.destroyErrno(l)} {
		if errno != unix.ENOENT {
			t.Error(errno)
		}
	}
	if errno := r.run(abi.RDMA_USER_CM_CMD_CREATE_ID, bytesOf(&abi.CMCreateID{UID: 1, Response: arenaAt, PS: abi.RDMA_PS_TCP}), 4); errno != unix.EBADF {
		t.Error(errno)
	}
}

func (r *raw) destroyErrno(id uint32) syscall.Errno {
	return r.run(abi.RDMA_USER_CM_CMD_DESTROY_ID, bytesOf(&abi.CMDestroyID{ID: id, Response: arenaAt}), 4)
}

var update = flag.Bool("update", false, "write testdata/golden.txt anew")

// Responses and events, byte by byte, but for what is random.
func TestGolden(t *testing.T) {
	m := newManagerOf(t, mlx5emu.Config{Numbered: true})
	r := newRaw(t, m)
	var out strings.Builder
	say := func(what string, b []byte) { // lines of zeros are left out
		fmt.Fprintf(&out, "%s: %d bytes\n", what, len(b))
		for at := 0; at < len(b); at += 16 {
			if line := b[at:min(at+16, len(b))]; !bytes.Equal(line, make([]byte, len(line))) {
				fmt.Fprintf(&out, "\t%3d %s\n", at, hex.EncodeToString(line))
			}
		}
	}
	all := func(what string, id uint32) {
		say(what+": QUERY addr", r.query(id, abi.RDMA_USER_CM_QUERY_ADDR, 280))
		say(what+": QUERY gid", r.query(id, abi.RDMA_USER_CM_QUERY_GID, 280))
		say(what+": QUERY path", r.query(id, abi.RDMA_USER_CM_QUERY_PATH, 8+6*72))
		say(what+": QUERY_ROUTE", r.queryRoute(id))
	}
	attrs := func(what string, id uint32) {
		for _, s := range []ib.QPState{ib.Init, ib.RTR, ib.RTS} {
			a, errno := r.attr(id, s)
			r.must(errno)
			a.RQPSN, a.SQPSN = 0, 0
			if a.AHAttr.IsGlobal != 0 {
				a.AHAttr.GRH.SGIDIndex = 0
			}
			say(fmt.Sprintf("%s: INIT_QP_ATTR %v", what, s), bytesOf(&a))
		}
	}
	event := func(what string, uid uint64, kind uint32, status int32) uint32 {
		e := r.event(uid, kind, status)
		say("event "+what, bytesOf(&e))
		return e.ID
	}
	l, active := r.create(0x101), r.create(0x102)
	all("new", active)
	r.must(r.bind(l, "127.0.0.1:7471"))
	r.must(r.bind(active, "127.0.0.1:7472"))
	r.must(r.listen(l, 0))
	all("bound", active)
	r.must(r.resolve(active, "127.0.0.1:7471"))
	event("ADDR_RESOLVED", 0x102, eventAddrResolved, 0)
	r.must(r.route(active))
	event("ROUTE_RESOLVED", 0x102, eventRouteResolved, 0)
	all("active", active)
	a, errno := r.attr(active, ib.Init)
	r.must(errno)
	say("before CONNECT: INIT_QP_ATTR INIT", bytesOf(&a))
	r.must(r.connect(active, func(q *abi.CMConnect) {
		q.ConnParam.QPNum, q.ConnParam.PrivateDataLen = 0x1234, uint8(copy(q.ConnParam.PrivateData[:], "question"))
	}))
	passive := event("CONNECT_REQUEST", 0x101, eventConnectRequest, 0)
	all("passive", passive)
	attrs("passive", passive)
	r.must(r.accept(passive, 0x103, func(q *abi.CMAccept) {
		q.ConnParam.QPNum, q.ConnParam.PrivateDataLen = 0x4321, uint8(copy(q.ConnParam.PrivateData[:], "answer"))
	}))
	event("CONNECT_RESPONSE", 0x102, eventConnectResponse, 0)
	attrs("active", active)
	r.must(r.accept(active, 0, nil))
	event("ESTABLISHED", 0x103, eventEstablished, 0)
	r.must(r.disconnect(active))
	r.destroy(active)
	event("DISCONNECTED", 0x103, eventDisconnected, 0)
	event("TIMEWAIT_EXIT", 0x103, eventTimewaitExit, 0)
	nobody := r.routed(0x104, "127.0.0.1:1")
	r.must(r.connect(nobody, nil))
	event("REJECTED", 0x104, eventRejected, 8)
	name := filepath.Join("testdata", "golden.txt")
	if *update {
		if err := os.WriteFile(name, []byte(out.String()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("not as in %s:\n%s", name, out.String())
	}
}
