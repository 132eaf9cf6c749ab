package mlx5emu

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Commands that are refused, with the kernel's error.
func TestRefusedCommands(t *testing.T) {
	d := newDevice(t, Config{Manual: true})
	k, err := d.OpenKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	type header struct {
		length, object, method, attrs uint16
		reserved1                     uint64
		driver, reserved2             uint32
	}
	put := func(h header, attrs ...[]byte) []byte {
		b := make([]byte, headerSize)
		le.PutUint16(b, h.length)
		le.PutUint16(b[2:], h.object)
		le.PutUint16(b[4:], h.method)
		le.PutUint16(b[6:], h.attrs)
		le.PutUint64(b[8:], h.reserved1)
		le.PutUint32(b[16:], h.driver)
		le.PutUint32(b[20:], h.reserved2)
		for _, a := range attrs {
			b = append(b, a...)
		}
		return b
	}
	attr := func(id, n, flags, extra uint16, data uint64) []byte {
		b := make([]byte, attrSize)
		le.PutUint16(b, id)
		le.PutUint16(b[2:], n)
		le.PutUint16(b[4:], flags)
		le.PutUint16(b[6:], extra)
		le.PutUint64(b[8:], data)
		return b
	}
	port := func(h header, attrs ...[]byte) []byte {
		h.object, h.method, h.driver, h.attrs = 0, abi.UVERBS_METHOD_QUERY_PORT, 1, uint16(len(attrs))
		h.length = uint16(headerSize + attrSize*len(attrs))
		return put(h, attrs...)
	}
	one := attr(0, 8, 1, 0, 1)
	for _, c := range []struct {
		name string
		cmd  []byte
		want syscall.Errno
	}{
		{"nothing", nil, unix.EFAULT},
		{"half a header", make([]byte, 12), unix.EFAULT},
		{"length beyond the command", put(header{length: 40, driver: 1, attrs: 1}), unix.EINVAL},
		{"length without its attributes", put(header{length: 24, driver: 1, attrs: 1}), unix.EINVAL},
		{"reserved word", put(header{length: 24, driver: 1, reserved1: 1}), unix.EPROTONOSUPPORT},
		{"reserved word at the end", put(header{length: 24, driver: 1, reserved2: 1}), unix.EPROTONOSUPPORT},
		{"another driver", put(header{length: 24, driver: 14}), unix.EINVAL},
		{"no such object", put(header{length: 24, driver: 1, object: 99}), unix.EPROTONOSUPPORT},
		{"DEVX", put(header{length: 24, driver: 1, object: abi.MLX5_IB_OBJECT_DEVX, method: 0x1000}), unix.EPROTONOSUPPORT},
		{"an attribute that is missing", port(header{}, one), unix.EINVAL},
		{"an attribute twice", port(header{}, one, one), unix.EINVAL},
		{"an attribute that nobody knows", port(header{}, attr(77, 8, 1, 0, 0)), unix.EPROTONOSUPPORT},
		{"an attribute with something extra", port(header{}, attr(0, 8, 1, 5, 1)), unix.EINVAL},
		{"a constant of 4 bytes", port(header{}, attr(0, 4, 1, 0, 1)), unix.EINVAL},
		{"room for too little", port(header{}, one, attr(1, 8, 1, 0, 4096)), unix.EINVAL},
		{"before the context", port(header{}, one, attr(1, 48, 1, 0, 4096)), unix.EINVAL},
	} {
		if got := k.Ioctl(c.cmd, 0); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	// With a context: what the answer goes to must be there.
	f := uverbs.NewFile(k, "mlx5_0", 1)
	req := abi.Mlx5AllocUcontextReqV2{LibCaps: abi.MLX5_LIB_CAP_DYN_UAR}
	info, err := f.GetContext(uverbs.Bytes(&req), make([]byte, 72))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(info.AsyncFD)
	if got := k.Ioctl(port(header{}, one, attr(1, 48, 1, 0, 4096)), 0); got != unix.EFAULT {
		t.Errorf("an answer to nowhere: %v", got)
	}
	if got := k.Ioctl(port(header{}, attr(0, 8, 1, 0, 2), attr(1, 48, 1, 0, 4096)), 0); got != unix.EINVAL {
		t.Errorf("port 2: %v", got)
	}
	if _, err := f.GetContext(uverbs.Bytes(&req), make([]byte, 72)); errno(err) != unix.EINVAL {
		t.Errorf("a second context: %v", err)
	}
}

// What is wrong with a request for an object.
func TestRefusedObjects(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	m := mapAt(t, 0, 4*pageSize)
	gone := mapAt(t, 0, pageSize)
	if err := unix.Mprotect(gone, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	readOnly := mapAt(t, 0, pageSize)
	if err := unix.Mprotect(readOnly, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	reg := func(start, n, iova uint64, access ib.Access) error {
		_, err := c.f.RegMR(c.pd, start, n, iova, access, nil, nil)
		return err
	}
	at := addrOf(m)
	for _, k := range []struct {
		name string
		err  error
		want syscall.Errno
	}{
		{"remote write without local write", reg(at, 64, at, ib.AccessRemoteWrite), unix.EINVAL},
		{"flags that do not exist", reg(at, 64, at, 1<<15), unix.EINVAL},
		{"on-demand paging", reg(at, 64, at, ib.AccessOnDemand), unix.EOPNOTSUPP},
		{"nothing", reg(at, 0, at, 0), unix.EINVAL},
		{"around the end", reg(at, ^uint64(0), at, 0), unix.EINVAL},
		{"another offset in the page", reg(at, 64, at+8, 0), unix.EINVAL},
		{"memory that is not there", reg(addrOf(gone), 64, addrOf(gone), 0), unix.EFAULT},
		{"addresses of nobody's", reg(1<<46, 64, 1<<46, 0), unix.EFAULT},
		{"memory that cannot be written", reg(addrOf(readOnly), 64, addrOf(readOnly), everything), unix.EFAULT},
	} {
		if errno(k.err) != k.want {
			t.Errorf("region of %s: %v, want %v", k.name, k.err, k.want)
		}
	}
	if err := reg(addrOf(readOnly), 64, addrOf(readOnly), 0); err != nil {
		t.Errorf("a region that is only read: %v", err)
	}

	cq := abi.Mlx5CreateCQ{BufAddr: at, DBAddr: at + 3*pageSize, CQESize: 64, Flags: abi.MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX}
	for _, k := range []struct {
		name    string
		change  func(*abi.Mlx5CreateCQ)
		entries int
		channel int
		want    syscall.Errno
	}{
		{"without entries", func(*abi.Mlx5CreateCQ) {}, 0, -1, unix.EINVAL},
		{"with too many", func(*abi.Mlx5CreateCQ) {}, 1 << 24, -1, unix.EINVAL},
		{"of odd CQEs", func(q *abi.Mlx5CreateCQ) { q.CQESize = 96 }, 63, -1, unix.EINVAL},
		{"compressed", func(q *abi.Mlx5CreateCQ) { q.CQECompEn = 1 }, 63, -1, unix.EINVAL},
		{"in no page", func(q *abi.Mlx5CreateCQ) { q.BufAddr += 64 }, 63, -1, unix.EINVAL},
		{"with a record that is not aligned", func(q *abi.Mlx5CreateCQ) { q.DBAddr += 4 }, 63, -1, unix.EINVAL},
		{"where nothing is", func(q *abi.Mlx5CreateCQ) { q.BufAddr = addrOf(gone) }, 63, -1, unix.EFAULT},
		{"longer than its memory", func(q *abi.Mlx5CreateCQ) { q.BufAddr = addrOf(readOnly) }, 1 << 20, -1, unix.EFAULT},
		{"in memory that cannot be written", func(q *abi.Mlx5CreateCQ) { q.BufAddr = addrOf(readOnly) }, 63, -1, unix.EFAULT},
		{"with its record nowhere", func(q *abi.Mlx5CreateCQ) { q.DBAddr = addrOf(gone) }, 63, -1, unix.EFAULT},
		{"at a UAR that is not there", func(q *abi.Mlx5CreateCQ) { q.UARPageIndex = 99 }, 63, -1, unix.EINVAL},
		{"with a channel that is none", func(*abi.Mlx5CreateCQ) {}, 63, 12345, unix.EBADF},
	} {
		u := cq
		k.change(&u)
		if _, _, err := c.f.CreateCQ(k.entries, k.channel, 1, uverbs.Bytes(&u), make([]byte, 8)); errno(err) != k.want {
			t.Errorf("CQ %s: %v, want %v", k.name, err, k.want)
		}
	}

	q := c.newCQ(64, -1)
	for to, want := range map[uint64]syscall.Errno{addrOf(readOnly): unix.EFAULT, addrOf(gone): unix.EFAULT, at + 64: unix.EINVAL} {
		if _, err := c.f.ResizeCQ(q.h, 31, uverbs.Bytes(&abi.Mlx5ResizeCQ{BufAddr: to, CQESize: 64}), nil); errno(err) != want {
			t.Errorf("to a buffer at %#x: %v, want %v", to, err, want)
		}
	}
	good := abi.Mlx5CreateQP{BufAddr: at, DBAddr: at + 3*pageSize, SQWQECount: 64, RQWQECount: 16, RQWQEShift: 6, Flags: abi.MLX5_QP_FLAG_UAR_PAGE_INDEX, Uidx: 1, BFRegIndex: c.page[1]}
	cmd := abi.CreateQP{PDHandle: c.pd, SendCQHandle: q.h, RecvCQHandle: q.h, MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 1, MaxRecvSGE: 1, QPType: uint8(ib.RC)}
	for _, k := range []struct {
		name   string
		change func(*abi.CreateQP, *abi.Mlx5CreateQP)
		want   syscall.Errno
	}{
		{"of an odd type", func(q *abi.CreateQP, _ *abi.Mlx5CreateQP) { q.QPType = abi.IB_UVERBS_QPT_XRC_INI }, unix.EOPNOTSUPP},
		{"in no domain", func(q *abi.CreateQP, _ *abi.Mlx5CreateQP) { q.PDHandle = 999 }, unix.EINVAL},
		{"with a domain for a CQ", func(q *abi.CreateQP, _ *abi.Mlx5CreateQP) { q.SendCQHandle = c.pd }, unix.EINVAL},
		{"of three blocks", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.SQWQECount = 3 }, unix.EINVAL},
		{"of too many blocks", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.SQWQECount = 1 << 16 }, unix.EINVAL},
		{"with receives of no size", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.RQWQEShift = 3 }, unix.EINVAL},
		{"with receives of a giant's size", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.RQWQEShift = 40 }, unix.EINVAL},
		{"without a UAR", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.Flags = 0 }, unix.EINVAL},
		{"with a UAR that is not there", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.BFRegIndex = 77 }, unix.EINVAL},
		{"with the index that is none", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.Uidx = uidxUnused }, unix.EINVAL},
		{"with signatures", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.Flags |= abi.MLX5_QP_FLAG_SIGNATURE }, unix.EINVAL},
		{"where nothing is", func(_ *abi.CreateQP, u *abi.Mlx5CreateQP) { u.BufAddr = addrOf(gone) }, unix.EFAULT},
	} {
		b, u := cmd, good
		k.change(&b, &u)
		if _, err := c.f.CreateQP(&b, uverbs.Bytes(&u), make([]byte, 40)); errno(err) != k.want {
			t.Errorf("QP %s: %v, want %v", k.name, err, k.want)
		}
	}
	// None of these has left anything behind.
	if err := c.f.DestroyCQ(q.h); err != nil {
		t.Error(err)
	}
	if err := c.f.DeallocPD(c.pd); errno(err) != unix.EBUSY { // the region above
		t.Errorf("closing a domain with a region: %v", err)
	}
}

// Changes of state, each with all attributes that it needs, with one of them missing, and with one too many.
func TestStates(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	cq := c.newCQ(64, -1)
	states := []ib.QPState{ib.Reset, ib.Init, ib.RTR, ib.RTS, ib.SQD, ib.SQE, ib.Err}
	// The ways to bring a queue pair into a state.
	way := map[ib.QPState][]ib.QPState{ib.Reset: {}, ib.Init: {ib.Init}, ib.RTR: {ib.Init, ib.RTR}, ib.RTS: {ib.Init, ib.RTR, ib.RTS},
		ib.SQD: {ib.Init, ib.RTR, ib.RTS, ib.SQD}, ib.Err: {ib.Init, ib.Err}}
	for _, typ := range []ib.QPType{ib.RC, ib.UC, ib.UD} {
		q := c.newQP(cq, cq, qpOptions{typ: typ, srq: -1, uidx: uint32(typ)})
		step := func(to ib.QPState, mask ib.QPAttrMask) error {
			a := q.attrs(q.qpn)
			a.State, a.CurState = to, q.state()
			return c.f.ModifyQP(q.h, &a, mask|ib.AttrState, ib.LinkEthernet)
		}
		for _, from := range states {
			if _, ok := way[from]; !ok {
				continue
			}
			for _, to := range states {
				bring := func() {
					if err := step(ib.Reset, 0); err != nil {
						t.Fatal(err)
					}
					at := ib.Reset
					for _, s := range way[from] {
						if err := step(s, changes[typ][[2]ib.QPState{at, s}].need); err != nil {
							t.Fatalf("%v: %v to %v: %v", typ, at, s, err)
						}
						at = s
					}
				}
				want := changes[typ][[2]ib.QPState{from, to}]
				_, ok := changes[typ][[2]ib.QPState{from, to}]
				ok = ok || to == ib.Reset || to == ib.Err && from != ib.Reset
				bring()
				if err := step(to, want.need); (err == nil) != ok {
					t.Errorf("%v: %v to %v: %v", typ, from, to, err)
				} else if err == nil && q.state() != to {
					t.Errorf("%v: %v to %v ends in %v", typ, from, to, q.state())
				}
				for bit := ib.QPAttrMask(2); bit <= ib.AttrDestQPN; bit <<= 1 {
					if ok && want.need&bit != 0 {
						bring()
						if err := step(to, want.need&^bit); errno(err) != unix.EINVAL {
							t.Errorf("%v: %v to %v without %v: %v", typ, from, to, bit, err)
						}
					}
					if ok && (want.need|want.may)&bit == 0 {
						bring()
						if err := step(to, want.need|bit); errno(err) != unix.EINVAL {
							t.Errorf("%v: %v to %v with %v: %v", typ, from, to, bit, err)
						}
					}
				}
			}
		}
	}
}

// What was set can be read back.
func TestQueryQP(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	got, err := p.f.QueryQP(p.a.h)
	if err != nil {
		t.Fatal(err)
	}
	want := p.a.attrs(p.b.qpn)
	want.State, want.CurState, want.QKey = ib.RTS, ib.RTS, 0
	if got != want {
		t.Errorf("the queue pair has\n%+v, not\n%+v", got, want)
	}
}

// Objects that others need are busy, in every order; then they go. A context takes along what is left.
func TestDestroyOrder(t *testing.T) {
	p := newPair(t, Config{}, ib.RC)
	m := p.reg(p.ma, everything)
	for what, err := range map[string]error{"PD": p.f.DeallocPD(p.pd), "CQ": p.f.DestroyCQ(p.ca.h)} {
		if errno(err) != unix.EBUSY {
			t.Errorf("%s in use: %v", what, err)
		}
	}
	if err := p.f.DestroyQP(p.a.h); err != nil {
		t.Error(err)
	}
	if err := p.f.DestroyQP(p.a.h); errno(err) != unix.ENOENT {
		t.Errorf("destroyed twice: %v", err)
	}
	if err := p.f.DestroyCQ(p.ca.h); err != nil {
		t.Error(err)
	}
	if err := p.f.DeregMR(m.Handle); err != nil {
		t.Error(err)
	}
	p.b.recv(segData(addrOf(p.mb), 512, p.kb)) // and a queue pair with a receive, whose peer has gone
}

// readEvent reads a record from an event file, if there is one.
func readEvent(t testing.TB, fd int) []byte {
	t.Helper()
	b := make([]byte, 64)
	pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(pfd, 0); n == 0 || err != nil {
		return nil
	}
	n, err := unix.Read(fd, b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// withChannel makes a completion channel, a CQ with it, and a queue pair with that CQ which is connected to another one.
func withChannel(t *testing.T) (p *pair, fd int, cq *cqueue, q, peer *queuePair) {
	t.Helper()
	p = newPair(t, Config{Manual: true}, ib.RC)
	fd, err := p.f.CreateCompChannel()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	cq = p.newCQ(32, fd)
	q = p.newQP(cq, cq, qpOptions{srq: -1, uidx: 9})
	peer = p.newQP(p.cb, p.cb, qpOptions{srq: -1, uidx: 10})
	q.connectTo(peer.qpn)
	peer.connectTo(q.qpn)
	return p, fd, cq, q, peer
}

func TestCompletionEvents(t *testing.T) {
	p, fd, cq, q, peer := withChannel(t)
	settle := func() {
		for p.dev.Step() {
		}
	}
	event := func(want bool) {
		t.Helper()
		settle()
		b := readEvent(t, fd)
		if want {
			p.until("an event", func() bool {
				if b == nil {
					b = readEvent(t, fd)
				}
				return b != nil
			})
		}
		if (b != nil) != want || want && (len(b) != 8 || le.Uint64(b) != 0xc000+32) {
			t.Fatalf("event % x, want one: %t", b, want)
		}
		if want {
			cq.sn++
		}
	}
	message := func(flags byte) {
		q.recv(segData(addrOf(p.ma), 8, p.ka))
		before := cq.ci
		peer.send(opSend, flags, 0, segInline([]byte("x")))
		p.until("a message", func() bool { _, ok := cq.poll(); return ok })
		cq.ci = before
		be.PutUint32(cq.db, before)
	}
	message(0)
	event(false) // it is not armed
	cq.arm(false)
	event(true) // one is there that was not seen
	cq.poll()
	cq.arm(false)
	event(false)
	message(0)
	event(true)
	cq.poll()
	message(0)
	event(false) // only one each time
	cq.poll()
	cq.arm(true)
	message(0)
	event(false) // not solicited
	message(ceSolicited)
	event(true)
	cq.poll()
	cq.poll()
	cq.arm(true)
	q.recv(segData(addrOf(p.ma), 8, p.ka+1))
	peer.send(opSend, 0, 0, segInline([]byte("x")))
	event(true) // an error counts as solicited
	cq.arm(false)
	settle()
	q.modify(ib.QPAttr{State: ib.Reset}, ib.AttrState)
	// Two arms before the device looks: both count.
	other := p.newCQ(16, fd)
	cq.poll()
	for cq.ci != 0 && func() bool { _, ok := cq.poll(); return ok }() {
	}
	cq.arm(false)
	other.arm(false)
	settle()
	d := p.dev
	d.mu.Lock()
	for _, c := range d.order[0].cqs {
		if (c.cqn == cq.cqn || c.cqn == other.cqn) && !c.armed {
			t.Errorf("CQ %#x is not armed", c.cqn)
		}
	}
	d.mu.Unlock()

	// Destroying tells how many events were read, and takes back the others.
	if err := p.f.DestroyQP(q.h); err != nil {
		t.Fatal(err)
	}
	var resp abi.DestroyCQResp
	if err := p.f.Write("destroy_cq", &uverbs.WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DESTROY_CQ, In: uverbs.Bytes(&abi.DestroyCQ{CQHandle: cq.h}), Out: uverbs.Bytes(&resp)}); err != nil {
		t.Fatal(err)
	}
	if resp.CompEventsReported != cq.sn {
		t.Errorf("%d events were reported, and %d read", resp.CompEventsReported, cq.sn)
	}
	if b := readEvent(t, fd); b != nil {
		t.Errorf("an event of a CQ that has gone: % x", b)
	}
}

// Events wait for more completions, or for a while.
func TestModeration(t *testing.T) {
	p, fd, cq, q, peer := withChannel(t)
	messages := func(n int) {
		t.Helper()
		for range n {
			q.recv(segData(addrOf(p.ma), 8, p.ka))
			peer.send(opSend, 0, 0, segInline([]byte("x")))
			p.until("a message", func() bool { _, ok := cq.poll(); return ok })
		}
		for p.dev.Step() {
		}
	}
	event := func(what string, want bool) {
		t.Helper()
		var b []byte
		if want {
			p.until(what, func() bool { b = readEvent(t, fd); return b != nil })
			cq.sn++
		} else if p.dev.Step(); readEvent(t, fd) != nil {
			t.Fatalf("an event: %s", what)
		}
	}
	arm := func() {
		for _, ok := cq.poll(); ok; _, ok = cq.poll() {
		}
		cq.arm(false)
		for p.dev.Step() {
		}
	}
	moderate := func(count, us uint16) {
		t.Helper()
		if err := p.f.ModerateCQ(cq.h, count, us); err != nil {
			t.Fatal(err)
		}
	}
	moderate(3, 0)
	arm()
	messages(2)
	event("after 2 of 3", false)
	messages(1)
	event("after 3 of 3", true)
	messages(5)
	event("it is not armed", false)
	cq.ci -= 2 // as if they were not seen
	cq.arm(false)
	for p.dev.Step() {
	}
	event("2 that were there when it was armed", false)
	messages(1)
	event("and one more", true)

	moderate(0, 4095)
	arm()
	began := time.Now()
	messages(1)
	event("after its time", true)
	if d := time.Since(began); d < 4095*time.Microsecond {
		t.Errorf("after %v", d)
	}

	moderate(1000, 1)
	arm()
	messages(1)
	time.Sleep(time.Millisecond)
	event("whichever comes first", true)

	moderate(1000, 0)
	arm()
	messages(1)
	event("1 of 1000", false)
	moderate(0, 0)
	event("not moderated any more", true)

	moderate(2, 0)
	arm()
	messages(1)
	arm() // it was seen
	messages(1)
	event("one since it was armed anew", false)

	if err := p.f.ModerateCQ(cq.h, 1, 4096); errno(err) != unix.EINVAL {
		t.Error(err)
	}
	if err := p.f.ModerateCQ(cq.h+100, 1, 1); errno(err) != unix.EINVAL {
		t.Error(err)
	}
	for _, c := range []struct {
		cmd  abi.ExModifyCQ
		want syscall.Errno
	}{{abi.ExModifyCQ{CQHandle: cq.h}, unix.EINVAL}, {abi.ExModifyCQ{CQHandle: cq.h, AttrMask: 2}, unix.EOPNOTSUPP}, {abi.ExModifyCQ{CQHandle: cq.h, AttrMask: 1, Reserved: 1}, unix.EINVAL}} {
		if err := p.f.Write("modify_cq", &uverbs.WriteCmd{Cmd: extended | abi.IB_USER_VERBS_EX_CMD_MODIFY_CQ, In: uverbs.Bytes(&c.cmd)}); errno(err) != c.want {
			t.Errorf("%+v: %v", c.cmd, err)
		}
	}
	if r, err := p.f.QueryDevice(); err != nil || r.CQModerationCaps.MaxCQModerationCount != 65535 || r.CQModerationCaps.MaxCQModerationPeriod != 4095 {
		t.Errorf("%+v, %v", r.CQModerationCaps, err)
	}
}

// A CQ that is not emptied overruns: it says so, and its queue pairs stop.
func TestOverrun(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	m := mapAt(t, 0, pageSize)
	k := uint32(c.reg(m, everything).LKey)
	small, big := c.newCQ(4, -1), c.newCQ(64, -1)
	a, b := c.newQP(small, big, qpOptions{srq: -1, uidx: 1}), c.newQP(big, big, qpOptions{srq: -1, uidx: 2})
	a.connectTo(b.qpn)
	b.connectTo(a.qpn)
	for range 5 {
		a.send(opWrite, ceUpdate, 0, segRemote(addrOf(m), k), segData(addrOf(m)+64, 8, k))
	}
	c.until("the error state", func() bool { return a.state() == ib.Err })
	seen := map[uint32]uint64{}
	for e := readEvent(t, c.async); e != nil; e = readEvent(t, c.async) {
		seen[le.Uint32(e[8:])] = le.Uint64(e)
	}
	if seen[uint32(ib.EventCQErr)] != 0xc004 || seen[uint32(ib.EventQPFatal)] != 0xa001 {
		t.Errorf("events %v", seen)
	}
	// A client that lies about what it has taken does not change that.
	be.PutUint32(small.db, 1<<20)
	a.send(opWrite, ceUpdate, 0, segRemote(addrOf(m), k), segData(addrOf(m)+64, 8, k))
	for c.dev.Step() {
	}
	var resp abi.DestroyQPResp
	if err := c.f.Write("destroy_qp", &uverbs.WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_DESTROY_QP, In: uverbs.Bytes(&abi.DestroyQP{QPHandle: a.h}), Out: uverbs.Bytes(&resp)}); err != nil || resp.EventsReported != 1 {
		t.Errorf("%d events of the queue pair were reported: %v", resp.EventsReported, err)
	}
}

// A CQ moves to a larger buffer with what is in it, as libmlx5 moves it.
func TestResize(t *testing.T) {
	p := newPair(t, Config{Manual: true}, ib.RC)
	write := func() {
		p.a.send(opWrite, ceUpdate, 0, segRemote(addrOf(p.mb), p.kb), segData(addrOf(p.ma), 8, p.ka))
	}
	for range 300 { // so that indices have wrapped
		write()
		p.ca.expect(cqeRequester, 8)
	}
	for range 10 {
		write()
	}
	for p.dev.Step() {
	}
	const n = 512
	fresh := mapAt(t, 0, n*64)
	for i := range n {
		fresh[64*i+63] = 0xf0
	}
	u := abi.Mlx5ResizeCQ{BufAddr: addrOf(fresh), CQESize: 64}
	got, err := p.f.ResizeCQ(p.ca.h, n-1, uverbs.Bytes(&u), make([]byte, 8))
	if err != nil || got != n-1 {
		t.Fatalf("%d entries: %v", got, err)
	}
	for range 3 {
		write()
	}
	for p.dev.Step() {
	}
	// The client copies until it finds the CQE that says that the rest is elsewhere, each one slot further on.
	for i := p.ca.ci; ; i++ {
		e := p.ca.buf[64*(i&(p.ca.n-1)):][:64]
		if e[63]>>4 == cqeResize {
			break
		}
		if i-p.ca.ci > 10 {
			t.Fatal("no CQE says that the queue has moved")
		}
		to := fresh[64*((i+1)&(n-1)):][:64]
		copy(to, e)
		to[63] = e[63]&^1 | byte((i+1)/n&1)
	}
	p.ca.ci++
	p.ca.buf, p.ca.n = fresh, n
	for range 13 {
		p.ca.expect(cqeRequester, 8)
	}
	if e, ok := p.ca.poll(); ok {
		t.Errorf("one more CQE: %+v", e)
	}
}

// The device of a kernel that knows no UAR objects: registers are numbered, and pages mapped by command and number.
func TestStaticUARs(t *testing.T) {
	d := newDevice(t, Config{StaticUARs: true, Manual: true})
	k, err := d.OpenKernel()
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, dev: d, f: uverbs.NewFile(k, d.Name(), abi.RDMA_DRIVER_MLX5), async: -1}
	defer c.f.Close()
	req := abi.Mlx5AllocUcontextReqV2{TotalNumBFRegs: 7, NumLowLatencyBFRegs: 2, MaxCQEVersion: 1, LibCaps: abi.MLX5_LIB_CAP_4K_UAR | abi.MLX5_LIB_CAP_DYN_UAR}
	var resp abi.Mlx5AllocUcontextResp
	info, err := c.f.GetContext(uverbs.Bytes(&req), uverbs.Bytes(&resp))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(info.AsyncFD)
	if resp.TotBFRegs != 8 || resp.NumUARsPerPage != 1 {
		t.Fatalf("context %+v", resp)
	}
	if err := c.f.Call("alloc_uar", abi.MLX5_IB_OBJECT_UAR, abi.MLX5_IB_METHOD_UAR_OBJ_ALLOC); errno(err) != unix.EPROTONOSUPPORT {
		t.Errorf("a UAR object: %v", err)
	}
	var pages [4][]byte
	for i := range pages {
		command := int64(abi.MLX5_IB_MMAP_NC_PAGE)
		if i == 1 {
			command = abi.MLX5_IB_MMAP_REGULAR_PAGE
		}
		if pages[i], err = c.f.Mmap((command<<8|int64(i))*pageSize, pageSize); err != nil {
			t.Fatal(err)
		}
		defer c.f.Munmap(pages[i])
	}
	c.uar[0] = pages[0] // CQs are armed in the first page
	var pdn [4]byte
	if c.pd, err = c.f.AllocPD(pdn[:]); err != nil {
		t.Fatal(err)
	}
	m := mapAt(t, 0, pageSize)
	key := uint32(c.reg(m, everything).LKey)
	cq := c.newCQ(64, -1)
	seen := map[uint32]bool{}
	var qps []*queuePair
	for i := range 6 {
		buf, db := mapAt(t, 0, 64*64), mapAt(t, 0, pageSize)
		u := abi.Mlx5CreateQP{BufAddr: addrOf(buf), DBAddr: addrOf(db), SQWQECount: 64, Uidx: uint32(i)}
		var r abi.Mlx5CreateQPResp
		q, err := c.f.CreateQP(&abi.CreateQP{PDHandle: c.pd, SendCQHandle: cq.h, RecvCQHandle: cq.h, MaxSendWR: 8, MaxSendSGE: 1, QPType: uint8(ib.RC)}, uverbs.Bytes(&u), uverbs.Bytes(&r))
		if err != nil {
			t.Fatal(err)
		}
		if seen[r.BFRegIndex] || r.BFRegIndex == 0 || r.BFRegIndex%4 > 1 {
			t.Errorf("queue pair %d has register %d", i, r.BFRegIndex)
		}
		seen[r.BFRegIndex] = true
		n := &queuePair{c: c, h: q.Handle, qpn: uint32(q.QPN), typ: ib.RC, sq: buf, db: db, sqn: 64}
		n.connectTo(n.qpn)
		n.post(opWrite, ceUpdate, 0, segRemote(addrOf(m), key), segData(addrOf(m)+64, 8, key))
		be.PutUint32(db[4:], 1)
		reg := pages[r.BFRegIndex/4][uarSend+int(r.BFRegIndex%4)*bfRegSize:]
		copy(reg[:8], buf[:8])
		if e := cq.expect(cqeRequester, 8); e.qpn != n.qpn {
			t.Errorf("a CQE of %#x, not %#x", e.qpn, n.qpn)
		}
		qps = append(qps, n)
	}
	_ = qps
}

// A client that has the file of its UAR pages can do with it what the owner of a file can. It must not take the memory away from under
// the device.
func TestPagesAreSealed(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	c.dev.mu.Lock()
	file := c.dev.order[0].Pages()
	c.dev.mu.Unlock()
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", file.Fd()), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for what, err := range map[string]error{
		"shorter":   unix.Ftruncate(fd, 0),
		"longer":    unix.Ftruncate(fd, (filePages+1)*pageSize),
		"collapsed": unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, pageSize),
	} {
		if err == nil {
			t.Errorf("the file can be made %s", what)
		}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != unix.EPERM {
		t.Errorf("another seal: %v", err)
	}
	// A hole reads as zero: no doorbell.
	if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, filePages*pageSize); err != nil {
		t.Error(err)
	}
	c.dev.Step()
}

// A fixedFile passes files within the process, all to the same number.
type fixedFile int

func (n fixedFile) Pass(fd int) (int, error) { return int(n), unix.Dup3(fd, int(n), unix.O_CLOEXEC) }

// No descriptor of an event file is left behind: not of a command that fails, nor of a channel whose number is another's by now.
func TestEventFilesEnd(t *testing.T) {
	d := newDevice(t, Config{Manual: true})
	k, err := d.OpenKernel()
	if err != nil {
		t.Fatal(err)
	}
	open := testutil.OpenFDs()
	get := func(response uint64, flags uint32) syscall.Errno {
		req := abi.Mlx5AllocUcontextReqV2{LibCaps: abi.MLX5_LIB_CAP_DYN_UAR, Flags: flags}
		b := make([]byte, 16, 64)
		le.PutUint64(b[8:], response)
		b = append(b, bytesOf(&req)...)
		le.PutUint32(b, abi.IB_USER_VERBS_CMD_GET_CONTEXT)
		le.PutUint16(b[4:], uint16(len(b)/4))
		le.PutUint16(b[6:], (8+72)/4)
		_, errno := k.Write(b)
		return errno
	}
	room := mapAt(t, 0, pageSize)
	if errno := get(addrOf(room), 1<<7); errno != unix.EINVAL {
		t.Errorf("a context with flags that nobody knows: %v", errno)
	}
	if errno := get(8, 0); errno != unix.EFAULT {
		t.Errorf("a context with an answer to nowhere: %v", errno)
	}
	if n := testutil.OpenFDs(); n != open {
		t.Errorf("commands that failed have left %d descriptors", n-open)
	}
	if errno := get(addrOf(room), 0); errno != 0 {
		t.Errorf("a context after all: %v", errno)
	}
	unix.Close(int(le.Uint32(room)))
	k.Close()

	c := connect(t, d)
	const number = 200
	channel := func() {
		t.Helper()
		if _, errno := writeCreateChannel(&writeCmd{c: d.order[0], files: fixedFile(number), answerable: func() syscall.Errno { return 0 }}); errno != 0 {
			t.Fatal(errno)
		}
	}
	channel()
	a := c.newCQ(16, number)
	unix.Close(number)
	channel()
	b := c.newCQ(16, number)
	d.mu.Lock()
	if l := d.order[0].cqs; l[0].channel == l[1].channel {
		t.Error("two channels are one")
	}
	d.mu.Unlock()
	unix.Close(number)
	for _, q := range []*cqueue{a, b} {
		if err := c.f.DestroyCQ(q.h); err != nil {
			t.Error(err)
		}
	}
	d.mu.Lock()
	if n := len(d.order[0].channels); n > 0 {
		t.Errorf("%d channels are left of which nobody knows", n)
	}
	d.mu.Unlock()
}

// A device that is closed while everything is in use.
func TestCloseWithAll(t *testing.T) {
	before := testutil.TakeSnapshot()
	t.Run("use", func(t *testing.T) {
		p := newPair(t, Config{}, ib.RC)
		for range 20 {
			p.b.recv(segData(addrOf(p.mb), 512, p.kb))
			p.a.send(opSend, ceUpdate, 0, segData(addrOf(p.ma), 100, p.ka))
		}
		if err := p.dev.Close(); err != nil {
			t.Error(err)
		}
		if err := p.f.DestroyQP(p.a.h); errno(err) != unix.EBADF {
			t.Errorf("a command to a device that is closed: %v", err)
		}
	})
	testutil.Eventually(t, "nothing is left", func() bool { return before.Diff() == "" })
}

// QUERY_QP tells the size of the ring of receives, as the kernel's driver does: a client's driver knows what was asked for.
func TestQueryTellsRing(t *testing.T) {
	c := connect(t, newDevice(t, Config{Manual: true}))
	cq := c.newCQ(64, -1)
	q := c.newQP(cq, cq, qpOptions{srq: -1, rqn: 256, shift: 6}) // 64 receives of 2 elements were asked for
	var r abi.QueryQPResp
	if err := c.f.Write("query_qp", &uverbs.WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_QUERY_QP, In: uverbs.Bytes(&abi.QueryQP{QPHandle: q.h}), Out: uverbs.Bytes(&r)}); err != nil {
		t.Fatal(err)
	}
	if r.MaxRecvWR != 256 || r.MaxRecvSGE != 4 || r.MaxSendWR != 0 || r.MaxSendSGE != 0 || r.MaxInlineData != 0 {
		t.Errorf("%+v", r)
	}
}
