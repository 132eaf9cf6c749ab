package mlx5emu

import (
	"bytes"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// segEth is an Ethernet segment.
func segEth(checksums byte, header []byte) []byte {
	b := make([]byte, max((14+len(header)+15)&^15, 16))
	b[4] = checksums
	be.PutUint16(b[12:], uint16(len(header)))
	copy(b[14:], header)
	return b
}

// udpFrame is one without checksums.
var udpFrame = []byte("\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x02\x08\x00" +
	"\x45\x00\x00\x20\x00\x00\x40\x00\x40\x11\x00\x00\x0a\x00\x00\x01\x0a\x00\x00\x02\x03\xe8\x07\xd0\x00\x0c\x00\x00abcd")

// flowCommand is a CREATE_FLOW; parts are put behind it.
func flowCommand(a abi.CreateFlow, specs ...[]byte) []byte {
	b := bytes.Join(specs, nil)
	a.FlowAttr.Size += uint16(len(b))
	a.FlowAttr.NumOfSpecs += uint8(len(specs))
	return append(slices.Clone(bytesOf(&a)), b...)
}

// spec is one of a flow rule's.
func spec(typ uint32, value, mask []byte) []byte {
	b := make([]byte, 8)
	le.PutUint32(b, typ)
	le.PutUint16(b[4:], uint16(8+len(value)+len(mask)))
	return append(append(b, value...), mask...)
}

// rule makes a flow rule.
func (q *queuePair) rule(kind ib.FlowKind, priority uint16, specs ...[]byte) (handle uint32, err error) {
	cmd := flowCommand(abi.CreateFlow{QPHandle: q.h, FlowAttr: abi.FlowAttr{Type: uint32(kind), Priority: priority, Port: 1}}, specs...)
	var resp abi.CreateFlowResp
	err = q.c.f.Write("create_flow", &uverbs.WriteCmd{Cmd: extended | abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW, In: cmd, Out: uverbs.Bytes(&resp)})
	return resp.FlowHandle, err
}

// rawPair is two raw packet queue pairs of a client, of which b gets all that a sends.
func rawPair(t testing.TB, cfg Config) *pair {
	t.Helper()
	c := connect(t, newDevice(t, cfg))
	p := &pair{client: c, ca: c.newCQ(128, -1), cb: c.newCQ(128, -1), ma: mapAt(t, 0, 4*pageSize), mb: mapAt(t, 0, 4*pageSize)}
	p.ka, p.kb = uint32(c.reg(p.ma, everything).LKey), uint32(c.reg(p.mb, everything).LKey)
	p.a = c.newQP(p.ca, p.ca, qpOptions{typ: ib.RawPacket, srq: -1, uidx: 1})
	p.b = c.newQP(p.cb, p.cb, qpOptions{typ: ib.RawPacket, srq: -1, uidx: 2, flags: selfFlags})
	p.a.connectTo(0)
	p.b.connectTo(0)
	if _, err := p.b.rule(ib.FlowMatch, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// A frame, out of all parts that it may have, and the completions on both sides.
func TestRawFrame(t *testing.T) {
	p := rawPair(t, Config{Manual: true})
	fill(p.ma[:300], 9)
	p.b.recv(segData(addrOf(p.mb)+7, 50, p.kb), segData(addrOf(p.mb)+100, 300, p.kb))
	head := udpFrame[:40]
	p.a.send(opSend, ceUpdate, 0, segEth(0, head), segData(addrOf(p.ma), 100, p.ka), segData(addrOf(p.ma)+200, 10, p.ka))
	if e := p.ca.wait(); e.op != cqeRequester || e.send != opSend || e.qpn != p.a.qpn || e.user != 1 || e.index != 0 {
		t.Errorf("%+v", e)
	}
	if e := p.cb.wait(); e.op != cqeRecvSend || e.n != 150 || e.qpn != 0 || e.user != 2 || e.index != 0 {
		t.Errorf("%+v", e)
	}
	want := append(append(slices.Clone(head), p.ma[:100]...), p.ma[200:210]...)
	if got := append(slices.Clone(p.mb[7:57]), p.mb[100:200]...); !bytes.Equal(got, want) {
		t.Errorf("\n got %x\nwant %x", got, want)
	}
	p.a.send(opNop, ceUpdate, 0)
	if e := p.ca.wait(); e.op != cqeRequester || e.send != opNop {
		t.Errorf("%+v", e)
	}
	// Inline data behind the header, unsignaled; the checksums are filled in.
	p.b.recv(segData(addrOf(p.mb), 1000, p.kb))
	p.a.send(opSend, 0, 0, segEth(ethL3Checksum|ethL4Checksum, udpFrame[:18]), segInline(udpFrame[18:]))
	e := p.cb.wait()
	if e.op != cqeRecvSend || e.n != minFrame || e.cqe[28] != cqeL3Right|cqeL4Right || e.cqe[29] != 2<<2 {
		t.Errorf("%+v", e)
	}
	if _, ok := p.ca.poll(); ok {
		t.Error("a completion that nobody has asked for")
	}
	// A frame that nobody receives is lost.
	p.a.send(opSend, ceUpdate, 0, segEth(0, udpFrame))
	p.ca.wait()
	p.b.recv(segData(addrOf(p.mb), 1000, p.kb))
	for p.dev.Step() {
	}
	if e, ok := p.cb.poll(); ok {
		t.Errorf("%+v", e)
	}
}

// What is wrong with a WQE ends it with an error, and takes the queue pair to ERR; nothing comes out of the port.
func TestBadFrames(t *testing.T) {
	good := udpFrame
	for _, c := range []struct {
		name     string
		cfg      Config
		op       byte
		rest     func(p *pair) [][]byte
		syndrome byte
	}{
		{"no Ethernet segment", Config{}, opSend, func(*pair) [][]byte { return nil }, 2},
		{"a header longer than the WQE", Config{}, opSend, func(*pair) [][]byte {
			b := segEth(0, good)
			be.PutUint16(b[12:], uint16(len(b)))
			return [][]byte{b}
		}, 2},
		{"a header of 1023 bytes", Config{}, opSend, func(*pair) [][]byte {
			b := segEth(0, good)
			be.PutUint16(b[12:], 1023)
			return [][]byte{b}
		}, 2},
		{"segmentation", Config{}, opSend, func(*pair) [][]byte {
			b := segEth(0, good)
			be.PutUint16(b[6:], 1460)
			return [][]byte{b}
		}, 2},
		{"checksums of what is inside", Config{}, opSend, func(*pair) [][]byte { return [][]byte{segEth(1<<4, good)} }, 2},
		{"another opcode", Config{}, opSendImm, func(*pair) [][]byte { return [][]byte{segEth(0, good)} }, 2},
		{"WRITE", Config{}, opWrite, func(*pair) [][]byte { return [][]byte{segEth(0, good)} }, 2},
		{"too little inline", Config{L2Inline: true}, opSend, func(p *pair) [][]byte {
			return [][]byte{segEth(0, good[:17]), segData(addrOf(p.ma), 100, p.ka)}
		}, 2},
		{"inline data longer than the WQE", Config{}, opSend, func(*pair) [][]byte {
			b := segInline(good)
			be.PutUint32(b, inlineBit|1000)
			return [][]byte{segEth(0, nil), b}
		}, 2},
		{"inline data beside elements", Config{}, opSend, func(p *pair) [][]byte {
			return [][]byte{segEth(0, nil), segInline(good), segData(addrOf(p.ma), 100, p.ka)}
		}, 2},
		{"no frame", Config{}, opSend, func(p *pair) [][]byte { return [][]byte{segEth(0, good[:13])} }, 2},
		{"a key that is not there", Config{}, opSend, func(p *pair) [][]byte { return [][]byte{segEth(0, good), segData(addrOf(p.ma), 100, 0xdead)} }, 4},
		{"outside of the region", Config{}, opSend, func(p *pair) [][]byte {
			return [][]byte{segEth(0, good), segData(addrOf(p.ma)+4*pageSize-50, 51, p.ka)}
		}, 4},
		{"before the region", Config{}, opSend, func(p *pair) [][]byte { return [][]byte{segEth(0, good), segData(addrOf(p.ma)-1, 5, p.ka)} }, 4},
		{"outside, and too long", Config{}, opSend, func(p *pair) [][]byte { return [][]byte{segEth(0, good), segData(addrOf(p.ma), 0, p.ka)} }, 4},
		{"of another protection domain", Config{}, opSend, func(p *pair) [][]byte {
			var pdn [4]byte
			pd, err := p.f.AllocPD(pdn[:])
			if err != nil {
				p.t.Fatal(err)
			}
			m, err := p.f.RegMR(pd, addrOf(p.ma), pageSize, addrOf(p.ma), everything, nil, nil)
			if err != nil {
				p.t.Fatal(err)
			}
			return [][]byte{segEth(0, good), segData(addrOf(p.ma), 100, uint32(m.LKey))}
		}, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.cfg.Manual = true
			p := rawPair(t, c.cfg)
			p.b.recv(segData(addrOf(p.mb), 1000, p.kb))
			p.a.post(c.op, 0, 0, c.rest(p)...)
			p.a.send(opSend, 0, 0, segEth(0, good))
			if e := p.ca.wait(); e.op != cqeRequesterErr || e.syndrome != c.syndrome {
				t.Errorf("%+v", e)
			}
			if e := p.ca.wait(); e.op != cqeRequesterErr || e.syndrome != 5 {
				t.Errorf("the one behind: %+v", e)
			}
			if s := p.a.state(); s != ib.Err {
				t.Errorf("state %v", s)
			}
			for p.dev.Step() {
			}
			if e, ok := p.cb.poll(); ok {
				t.Errorf("received: %+v", e)
			}
		})
	}
}

// Receives that cannot be written to end with an error.
func TestBadFrameReceives(t *testing.T) {
	for name, seg := range map[string]func(p *pair) ([]byte, byte){
		"no memory":               func(p *pair) ([]byte, byte) { return nil, 1 },
		"too little":              func(p *pair) ([]byte, byte) { return segData(addrOf(p.mb), minFrame-1, p.kb), 1 },
		"a key that is not there": func(p *pair) ([]byte, byte) { return segData(addrOf(p.mb), 100, 0xdead), 4 },
		"memory that is only read": func(p *pair) ([]byte, byte) {
			return segData(addrOf(p.mb), 100, uint32(p.reg(p.mb, 0).LKey)), 4
		},
		"beyond the region": func(p *pair) ([]byte, byte) { return segData(addrOf(p.mb)+4*pageSize-10, 100, p.kb), 4 },
	} {
		t.Run(name, func(t *testing.T) {
			p := rawPair(t, Config{Manual: true})
			s, syndrome := seg(p)
			p.b.recv(s)
			p.b.recv(segData(addrOf(p.mb), 100, p.kb))
			p.a.send(opSend, 0, 0, segEth(0, udpFrame))
			if e := p.cb.wait(); e.op != cqeResponderErr || e.syndrome != syndrome || e.index != 0 || e.user != 2 {
				t.Errorf("%+v", e)
			}
			if e := p.cb.wait(); e.op != cqeResponderErr || e.syndrome != 5 || e.index != 1 {
				t.Errorf("the one behind: %+v", e)
			}
		})
	}
}

// Counters that cannot be, and queues that are not there any more.
func TestRawCounterLost(t *testing.T) {
	p := rawPair(t, Config{Manual: true})
	be.PutUint32(p.b.db, 65)
	p.a.send(opSend, 0, 0, segEth(0, udpFrame))
	p.until("the error state", func() bool { return p.b.state() == ib.Err })
}

func TestRawMemoryGone(t *testing.T) {
	p := rawPair(t, Config{Manual: true})
	be.PutUint32(p.b.db, 1)
	if err := unix.Mprotect(p.b.buf[:pageSize], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	p.a.send(opSend, 0, 0, segEth(0, udpFrame))
	p.until("the error state", func() bool { return p.b.state() == ib.Err })
}

// What is wrong with a request for a raw packet queue pair, or a rule.
func TestRefusedRaw(t *testing.T) {
	p := rawPair(t, Config{Manual: true})
	cq := p.newCQ(64, -1)
	rc := p.newQP(cq, cq, qpOptions{srq: -1, uidx: 7})
	if _, err := p.tryQP(cq, cq, qpOptions{srq: -1, uidx: 8, flags: selfFlags}); errno(err) != unix.EINVAL {
		t.Errorf("loopback of an RC queue pair: %v", err)
	}
	mac := spec(abi.FlowSpecEth, make([]byte, 16), make([]byte, 16))
	ip := spec(abi.FlowSpecIPv4, make([]byte, 12), make([]byte, 12))
	good := abi.CreateFlow{QPHandle: p.b.h, FlowAttr: abi.FlowAttr{Port: 1}}
	for _, c := range []struct {
		name   string
		change func(*abi.CreateFlow)
		specs  [][]byte
		want   syscall.Errno
	}{
		{"a queue pair that is none", func(f *abi.CreateFlow) { f.QPHandle = 999 }, nil, unix.EINVAL},
		{"one of RC", func(f *abi.CreateFlow) { f.QPHandle = rc.h }, nil, unix.EINVAL},
		{"port 0", func(f *abi.CreateFlow) { f.FlowAttr.Port = 0 }, nil, unix.EINVAL},
		{"an unknown kind", func(f *abi.CreateFlow) { f.FlowAttr.Type = 4 }, nil, unix.EINVAL},
		{"a mask", func(f *abi.CreateFlow) { f.CompMask = 1 }, nil, unix.EINVAL},
		{"reserved", func(f *abi.CreateFlow) { f.FlowAttr.Reserved[1] = 1 }, nil, unix.EINVAL},
		{"flags", func(f *abi.CreateFlow) { f.FlowAttr.Flags = 1 }, nil, unix.EOPNOTSUPP},
		{"a priority", func(f *abi.CreateFlow) { f.FlowAttr.Priority = 16 }, nil, unix.ENOSPC},
		{"less than it says", func(f *abi.CreateFlow) { f.FlowAttr.Size = 8 }, [][]byte{mac}, unix.EINVAL},
		{"one spec too few", func(f *abi.CreateFlow) { f.FlowAttr.NumOfSpecs = 1 }, [][]byte{mac}, unix.EINVAL},
		{"one spec too many", func(f *abi.CreateFlow) { f.FlowAttr.NumOfSpecs = 255 }, [][]byte{mac}, unix.EINVAL},
		{"too many", func(f *abi.CreateFlow) { f.FlowAttr.NumOfSpecs = 11 }, nil, unix.EINVAL},
		{"the same twice", func(*abi.CreateFlow) {}, [][]byte{mac, mac}, unix.EINVAL},
		{"an unknown spec", func(*abi.CreateFlow) {}, [][]byte{spec(0x50, make([]byte, 4), make([]byte, 4))}, unix.EINVAL},
		{"a spec of another size", func(*abi.CreateFlow) {}, [][]byte{spec(abi.FlowSpecEth, make([]byte, 12), make([]byte, 12))}, unix.EINVAL},
		{"a spec that is cut", func(*abi.CreateFlow) {}, [][]byte{mac[:32]}, unix.EINVAL},
		{"TTL", func(*abi.CreateFlow) {}, [][]byte{spec(abi.FlowSpecIPv4, make([]byte, 12), append(make([]byte, 10), 255, 0))}, unix.EOPNOTSUPP},
		{"hop limit", func(*abi.CreateFlow) {}, [][]byte{spec(abi.FlowSpecIPv6, make([]byte, 40), append(make([]byte, 38), 1, 0))}, unix.EOPNOTSUPP},
		{"filters of the rest", func(f *abi.CreateFlow) { f.FlowAttr.Type = 1 }, [][]byte{mac}, unix.EINVAL},
		{"nothing", func(*abi.CreateFlow) {}, [][]byte{mac, ip}, 0},
	} {
		f := good
		c.change(&f)
		var resp abi.CreateFlowResp
		err := p.f.Write("create_flow", &uverbs.WriteCmd{Cmd: extended | abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW, In: flowCommand(f, c.specs...), Out: uverbs.Bytes(&resp)})
		if errno(err) != c.want {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if err := p.f.DestroyQP(p.b.h); errno(err) != unix.EBUSY {
		t.Errorf("a queue pair that has rules: %v", err)
	}
	if err := p.f.DestroyFlow(999); errno(err) != unix.ENOENT {
		t.Errorf("a rule that is none: %v", err)
	}
	h, err := p.a.rule(ib.FlowSniffer, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.f.DestroyFlow(h); err != nil {
		t.Error(err)
	}
	if err := p.f.DestroyQP(p.a.h); err != nil {
		t.Errorf("a queue pair that has no rules any more: %v", err)
	}
}
