//go:build amd64 || arm64

package mlx5_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Raw packet queue pairs from end to end: the public packages, this driver, and emulated devices whose ports a switch connects.

// A card is an emulated device, which may be opened more than once.
type card struct{ d *mlx5emu.Device }

func (c card) Info() driver.DeviceInfo {
	return driver.DeviceInfo{Name: c.d.Name(), Provider: "mlx5", Tier: driver.TierHardware}
}

func (c card) Open() (driver.Context, error) {
	k, err := c.d.OpenKernel()
	if err != nil {
		return nil, err
	}
	return mlx5.OpenKernel(k, c.d.Name())
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func closes(t testing.TB, list ...interface{ Close() error }) {
	t.Cleanup(func() { testutil.Close(t, list...) })
}

func newCard(t testing.TB, cfg mlx5emu.Config) card {
	cfg.HostOnly = true
	d := must(mlx5emu.NewDevice(cfg))
	closes(t, d)
	return card{d}
}

// A host is a context of a card, with memory: in its first half there is what is sent, in the other what is received, by each of up to 8
// ends in a part of its own.
type host struct {
	t    testing.TB
	ctx  *verbs.Context
	pd   *verbs.PD
	mem  *mr.MR
	ends int
}

const half, part = 1 << 16, 1 << 13

func newHost(t testing.TB, c card) *host {
	t.Helper()
	h := &host{t: t, ctx: must(verbs.OpenDriver(c))}
	h.pd = must(h.ctx.AllocPD())
	h.mem = must(mr.Alloc(h.pd, 2*half, ib.AccessLocalWrite))
	closes(t, h.mem, h.pd, h.ctx)
	return h
}

// An end is a queue pair of a host, in RTS, with a completion queue of its own.
type end struct {
	*host
	cq *verbs.CQ
	q  *qp.QP
	at int // in the memory: its part
}

func (h *host) end(change ...func(*qp.Config)) *end {
	h.t.Helper()
	e := h.idle(change...)
	if err := e.q.ActivateRaw(h.t.Context(), 1); err != nil {
		h.t.Fatal(err)
	}
	return e
}

// idle is an end in RESET.
func (h *host) idle(change ...func(*qp.Config)) *end {
	h.t.Helper()
	e := &end{host: h, cq: must(h.ctx.NewCQ(verbs.CQConfig{})), at: half + h.ends*part}
	h.ends++
	cfg := qp.Config{Type: ib.RawPacket, SendCQ: e.cq, RecvSGE: 2}
	for _, f := range change {
		f(&cfg)
	}
	q, err := qp.New(h.pd, &cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	e.q = q
	closes(h.t, e.q, e.cq)
	return e
}

func (e *end) steer(r ib.FlowRule) *qp.Flow {
	e.t.Helper()
	f, err := e.q.Steer(r)
	if err != nil {
		e.t.Fatal(err)
	}
	closes(e.t, f)
	return f
}

// recv posts receives of n bytes each, one behind the other in the memory.
func (e *end) recv(count, n int) {
	e.t.Helper()
	for i := range count {
		if _, err := e.q.PostRecv([]ib.RecvWR{{ID: uint64(i), SGEs: []ib.SGE{e.mem.SGE(e.at+i*n, 10), e.mem.SGE(e.at+i*n+10, n-10)}}}); err != nil {
			e.t.Fatal(err)
		}
	}
}

// got is what receive i of n bytes has.
func (e *end) got(i, n, length int) []byte { return e.mem.Bytes()[e.at+i*n:][:length] }

// send sends a frame whose first bytes are inline, and waits for the completion.
func (e *end) send(frame []byte, inline int, flags ib.SendFlags) {
	e.t.Helper()
	copy(e.mem.Bytes(), frame)
	wr := ib.SendWR{ID: 77, Opcode: ib.OpSend, Flags: flags | ib.SendSignaled, Inline: frame[:inline]}
	if rest := len(frame) - inline; rest > 0 {
		first := min(rest, 5)
		wr.SGEs = []ib.SGE{e.mem.SGE(inline, first)}
		if rest > first {
			wr.SGEs = append(wr.SGEs, e.mem.SGE(inline+first, rest-first))
		}
	}
	if _, err := e.q.PostSend([]ib.SendWR{wr}); err != nil {
		e.t.Fatal(err)
	}
	if wc := e.wait(); wc.ID != 77 || wc.Status != ib.WCSuccess || wc.Opcode != ib.WCSend || wc.QPN != e.q.QPN() {
		e.t.Fatalf("%+v", wc)
	}
}

func (e *end) wait() (wc ib.WC) {
	e.t.Helper()
	testutil.Eventually(e.t, "a completion", func() bool {
		var l [1]ib.WC
		n, err := e.cq.Poll(l[:])
		if err != nil {
			e.t.Fatal(err)
		}
		wc = l[0]
		return n == 1
	})
	return wc
}

// nothing looks whether there are completions.
func (e *end) nothing() {
	e.t.Helper()
	var l [1]ib.WC
	if n, err := e.cq.Poll(l[:]); n != 0 || err != nil {
		e.t.Errorf("%d completions: %+v, %v", n, l[0], err)
	}
}

var (
	macA = ib.MAC{2, 0, 0, 0, 0, 0xa}
	macB = ib.MAC{2, 0, 0, 0, 0, 0xb}
	macC = ib.MAC{2, 0, 0, 0, 0, 0xc}
	all  = ib.MAC{255, 255, 255, 255, 255, 255}
)

func toMAC(m ib.MAC) ib.FlowRule {
	return ib.FlowRule{Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{Dst: m}, Mask: ib.FlowEth{Dst: all}}}
}

func toUDP(port uint16) ib.FlowRule {
	return ib.FlowRule{UDP: &ib.FlowFilter[ib.FlowPorts]{Value: ib.FlowPorts{Dst: port}, Mask: ib.FlowPorts{Dst: 0xffff}}}
}

// ethernet is a frame of any type.
func ethernet(dst, src ib.MAC, typ uint16, payload ...byte) []byte {
	b := append(append([]byte(nil), dst[:]...), src[:]...)
	return append(binary.BigEndian.AppendUint16(b, typ), payload...)
}

// tagged is a frame with a VLAN tag.
func tagged(vlan uint16, frame []byte) []byte {
	b := append([]byte(nil), frame[:12]...)
	b = binary.BigEndian.AppendUint16(b, 0x8100)
	return append(binary.BigEndian.AppendUint16(b, vlan), frame[12:]...)
}

// transport is a TCP or UDP packet whose checksums are 0.
func transport(protocol byte, from, to uint16, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from), to)
	if protocol == 6 {
		b = append(b, make([]byte, 16)...)
		b[12] = 5 << 4
	} else {
		b = append(binary.BigEndian.AppendUint16(b, uint16(8+len(payload))), 0, 0)
	}
	return append(b, payload...)
}

func ipv4(dst, src ib.MAC, protocol byte, payload []byte) []byte {
	h := []byte{0x45, 8, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
	return ethernet(dst, src, 0x0800, append(h, payload...)...)
}

func ipv6(dst, src ib.MAC, protocol byte, payload []byte) []byte {
	h := make([]byte, 40)
	binary.BigEndian.PutUint32(h, 6<<28|9<<20|0x12345)
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	h[6], h[7], h[23], h[39] = protocol, 64, 1, 2
	return ethernet(dst, src, 0x86dd, append(h, payload...)...)
}

// Frames of all lengths, with beginnings of all lengths inline, arrive as they were sent; short ones are filled up.
func TestFrames(t *testing.T) {
	for _, l2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("l2=%v", l2), func(t *testing.T) {
			a := newHost(t, newCard(t, mlx5emu.Config{L2Inline: l2})).end()
			b := newHost(t, newCard(t, mlx5emu.Config{L2Inline: l2})).end()
			b.steer(toMAC(macB))
			least := must(a.ctx.QueryDevice()).MinFrameInline
			if want := map[bool]int{true: 18}[l2]; least != want {
				t.Fatalf("%d bytes inline, want %d", least, want)
			}
			for i := range 150 {
				length := 18 + i*7
				frame := ethernet(macB, macA, 0x88b5, make([]byte, length-14)...)
				for k := range frame[14:] {
					frame[14+k] = byte(i + k)
				}
				inline := min(least+i%40, length, a.q.Cap().MaxInline)
				b.recv(1, 2000)
				a.send(frame, inline, 0)
				wc := b.wait()
				want := append(frame, make([]byte, max(60-length, 0))...)
				if wc.Status != ib.WCSuccess || wc.Opcode != ib.WCRecv || wc.QPN != b.q.QPN() || int(wc.ByteLen) != len(want) || wc.Flags != 0 {
					t.Fatalf("%d bytes, %d inline: %+v", length, inline, wc)
				}
				if got := b.got(0, 2000, len(want)); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes, %d inline:\n got %x\nwant %x", length, inline, got, want)
				}
			}
			a.nothing()
			b.nothing()
		})
	}
}

// Which of several queue pairs gets which frame.
func TestSteering(t *testing.T) {
	a := newHost(t, newCard(t, mlx5emu.Config{})).end()
	other := newHost(t, newCard(t, mlx5emu.Config{}))
	vlan := func(v, mask uint16) ib.FlowRule {
		return ib.FlowRule{Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{VLAN: v}, Mask: ib.FlowEth{VLAN: mask}}}
	}
	after := func(r ib.FlowRule, priority uint16) ib.FlowRule { r.Priority = priority; return r }
	both := func(a, b ib.FlowRule) ib.FlowRule { a.UDP = b.UDP; return a }
	udp := ipv4(macB, macA, 17, transport(17, 1000, 2000, 1, 2, 3))
	tcp := ipv4(macB, macA, 6, transport(6, 1000, 2000, 1, 2, 3))
	udp6 := ipv6(macB, macA, 17, transport(17, 1000, 2000, 1, 2, 3))
	other6 := ib.FlowIPv6{Src: [16]byte{15: 1}, Dst: [16]byte{15: 2}, FlowLabel: 0x12345, NextHeader: 17, TrafficClass: 9}
	fragment := bytes.Clone(udp)
	fragment[14+7] = 1
	for _, c := range []struct {
		name  string
		rules []ib.FlowRule // of a queue pair each
		frame []byte
		want  []int
	}{
		{"no rule", nil, udp, nil},
		{"another address", []ib.FlowRule{toMAC(macC)}, udp, nil},
		{"an address", []ib.FlowRule{toMAC(macC), toMAC(macB)}, udp, []int{1}},
		{"equal rules", []ib.FlowRule{toMAC(macB), toMAC(macC), toMAC(macB)}, udp, []int{0, 2}},
		{"everything", []ib.FlowRule{{}}, udp, []int{0}},
		{"some bits of an address", []ib.FlowRule{{Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{Dst: ib.MAC{5: 3}}, Mask: ib.FlowEth{Dst: ib.MAC{5: 3}}}}}, udp, []int{0}},
		{"a sender", []ib.FlowRule{{Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{Src: macA}, Mask: ib.FlowEth{Src: all}}}}, udp, []int{0}},
		{"a type", []ib.FlowRule{{Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{Type: 0x88b5}, Mask: ib.FlowEth{Type: 0xffff}}}}, ethernet(macC, macA, 0x88b5), []int{0}},
		{"a tag", []ib.FlowRule{vlan(5, 0xfff), vlan(6, 0xfff)}, tagged(0x2006, udp), []int{1}},
		{"tag 0 of a frame without", []ib.FlowRule{vlan(0, 0xfff)}, udp, nil},
		{"a UDP port", []ib.FlowRule{toUDP(2001), toUDP(2000)}, udp, []int{1}},
		{"a UDP port behind a tag", []ib.FlowRule{toUDP(2001), toUDP(2000)}, tagged(7, udp), []int{1}},
		{"a UDP port over IPv6", []ib.FlowRule{toUDP(2001), toUDP(2000)}, udp6, []int{1}},
		{"a UDP port of TCP", []ib.FlowRule{toUDP(2000)}, tcp, nil},
		{"a UDP port of a fragment", []ib.FlowRule{toUDP(2000)}, fragment, nil},
		{"a TCP port", []ib.FlowRule{{TCP: &ib.FlowFilter[ib.FlowPorts]{Value: ib.FlowPorts{Src: 1000}, Mask: ib.FlowPorts{Src: 0xffff}}}}, tcp, []int{0}},
		{"IPv4", []ib.FlowRule{{IPv4: &ib.FlowFilter[ib.FlowIPv4]{Value: ib.FlowIPv4{Dst: [4]byte{10, 0, 0, 9}, Src: [4]byte{10, 0, 0, 1}, Protocol: 17, TOS: 8},
			Mask: ib.FlowIPv4{Dst: [4]byte{255, 255, 255}, Src: [4]byte{255, 255, 255, 255}, Protocol: 255, TOS: 255}}}}, udp, []int{0}},
		{"another protocol of IPv4", []ib.FlowRule{{IPv4: &ib.FlowFilter[ib.FlowIPv4]{Value: ib.FlowIPv4{Protocol: 6}, Mask: ib.FlowIPv4{Protocol: 255}}}}, udp, nil},
		{"IPv6", []ib.FlowRule{{IPv6: &ib.FlowFilter[ib.FlowIPv6]{Value: other6, Mask: ib.FlowIPv6{Src: [16]byte{15: 255}, Dst: [16]byte{15: 255}, FlowLabel: 1<<20 - 1, NextHeader: 255, TrafficClass: 255}}}}, udp6, []int{0}},
		{"IPv6 of IPv4", []ib.FlowRule{{IPv6: &ib.FlowFilter[ib.FlowIPv6]{}}}, udp, nil},
		{"two filters, of which one does not match", []ib.FlowRule{both(toMAC(macC), toUDP(2000)), both(toMAC(macB), toUDP(2000))}, udp, []int{1}},
		{"a lower number goes first", []ib.FlowRule{after(toMAC(macB), 3), after(toUDP(2000), 2)}, udp, []int{1}},
		{"also if it was made first", []ib.FlowRule{after(toMAC(macB), 2), after(toUDP(2000), 3)}, udp, []int{0}},
		{"the rest", []ib.FlowRule{{Kind: ib.FlowDefault}, after(toMAC(macC), 14)}, udp, []int{0}},
		{"not the rest", []ib.FlowRule{{Kind: ib.FlowDefault}, after(toMAC(macB), 14)}, udp, []int{1}},
		{"groups", []ib.FlowRule{{Kind: ib.FlowDefault}, {Kind: ib.FlowMulticast}}, ethernet(all, macA, 0x88b5), []int{1}},
		{"no group", []ib.FlowRule{{Kind: ib.FlowMulticast}}, udp, nil},
		{"a copy", []ib.FlowRule{{Kind: ib.FlowSniffer}, toMAC(macB)}, udp, []int{0, 1}},
		{"a copy of what nobody gets", []ib.FlowRule{{Kind: ib.FlowSniffer}}, udp, []int{0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := *other
			h.t = t
			var ends []*end
			for _, r := range c.rules {
				if r.Kind == ib.FlowMatch {
					r.Priority++
				}
				e := h.end()
				e.steer(r)
				e.recv(1, 500) // a sniffer does not get the last frame
				ends = append(ends, e)
			}
			last := h.end() // gets what comes last, before all others would
			last.steer(toMAC(ib.MAC{2, 9}))
			last.recv(2, 500)
			a.send(c.frame, min(18, len(c.frame)), 0)
			a.send(ethernet(ib.MAC{2, 9}, macA, 1, make([]byte, 60)...), 18, 0)
			last.wait()
			last.nothing()
			for i, e := range ends {
				if slices.Contains(c.want, i) {
					if wc := e.wait(); wc.Status != ib.WCSuccess || !bytes.Equal(e.got(0, 500, len(c.frame)), c.frame) {
						t.Errorf("queue pair %d: %+v, %x", i, wc, e.got(0, 500, len(c.frame)))
					}
				}
				e.nothing()
			}
		})
	}
}

// A rule that was closed brings nothing any more, and a queue pair is not closed before its rules.
func TestFlowsEnd(t *testing.T) {
	a, b := newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).end()
	f := must(b.q.Steer(toMAC(macB)))
	b.steer(toMAC(macC))
	b.recv(3, 100)
	a.send(ethernet(macB, macA, 1, make([]byte, 50)...), 20, 0)
	b.wait()
	if err := b.q.Close(); !errors.Is(err, verbs.ErrBusy) {
		t.Errorf("close the queue pair: %v", err)
	}
	if f.QP() != b.q {
		t.Error("another queue pair")
	}
	for range 2 {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	a.send(ethernet(macB, macA, 1, make([]byte, 50)...), 20, 0)
	a.send(ethernet(macC, macA, 2, make([]byte, 50)...), 20, 0)
	b.wait()
	if typ := b.got(1, 100, 14)[13]; typ != 2 {
		t.Errorf("frame %d came in", typ)
	}
	b.nothing()
}

// What cannot be made.
func TestRawRefused(t *testing.T) {
	h := newHost(t, newCard(t, mlx5emu.Config{}))
	e := h.end()
	srq := must(qp.NewSRQ(h.pd, qp.SRQConfig{}))
	closes(t, srq)
	if _, err := qp.New(h.pd, &qp.Config{Type: ib.RawPacket, SendCQ: e.cq, SRQ: srq}); err == nil {
		t.Error("with a shared receive queue")
	}
	if _, err := qp.New(h.pd, &qp.Config{Type: ib.RC, SendCQ: e.cq, Loopback: true}); err == nil {
		t.Error("Loopback of another type")
	}
	rc := must(qp.New(h.pd, &qp.Config{SendCQ: e.cq}))
	closes(t, rc)
	if _, err := rc.Steer(toMAC(macA)); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("rules of an RC queue pair: %v", err)
	}
	for name, r := range map[string]ib.FlowRule{
		"no kind":               {Kind: 7},
		"port 2":                {Port: 2},
		"priority 16":           {Priority: 16},
		"filters of the rest":   {Kind: ib.FlowDefault, Eth: toMAC(macA).Eth},
		"a priority of a copy":  {Kind: ib.FlowSniffer, Priority: 1},
		"TCP and UDP":           {TCP: toUDP(1).UDP, UDP: toUDP(1).UDP},
		"IPv4 and IPv6":         {IPv4: &ib.FlowFilter[ib.FlowIPv4]{}, IPv6: &ib.FlowFilter[ib.FlowIPv6]{}},
		"a flow label too long": {IPv6: &ib.FlowFilter[ib.FlowIPv6]{Mask: ib.FlowIPv6{FlowLabel: 1 << 20}}},
	} {
		if f, err := e.q.Steer(r); err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
	soft := must(verbs.Open("soft0"))
	pd := must(soft.AllocPD())
	cq := must(soft.NewCQ(verbs.CQConfig{}))
	closes(t, cq, pd, soft)
	if _, err := qp.New(pd, &qp.Config{Type: ib.RawPacket, SendCQ: cq}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("on the software NIC: %v", err)
	}
}

// A frame longer than the receive ends it, and the queue pair; one that is longer than the port takes is lost.
func TestOversizedFrames(t *testing.T) {
	a, b := newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).end()
	b.steer(toMAC(macB))
	b.recv(3, 200)
	a.send(ethernet(macB, macA, 1, make([]byte, 9300)...), 20, 0)
	a.send(ethernet(macB, macA, 2, make([]byte, 200-14)...), 20, 0)
	if wc := b.wait(); wc.Status != ib.WCSuccess || wc.ByteLen != 200 {
		t.Errorf("%+v", wc)
	}
	a.send(ethernet(macB, macA, 2, make([]byte, 201-14)...), 20, 0)
	if wc := b.wait(); wc.Status != ib.WCLocalLengthErr || wc.ID != 1 {
		t.Errorf("%+v", wc)
	}
	if wc := b.wait(); wc.Status != ib.WCFlushErr || wc.ID != 2 {
		t.Errorf("%+v", wc)
	}
	if s := b.q.State(); s != ib.Err {
		t.Errorf("state %v", s)
	}
	// And it can begin anew.
	if err := b.q.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.q.ActivateRaw(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	b.recv(1, 200)
	a.send(ethernet(macB, macA, 3, make([]byte, 100)...), 20, 0)
	if wc := b.wait(); wc.Status != ib.WCSuccess || wc.ByteLen != 114 {
		t.Errorf("%+v", wc)
	}
	// Requests that are flushed.
	if err := a.q.Fail(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.q.PostSend([]ib.SendWR{{Opcode: ib.OpSend, Inline: make([]byte, 60), ID: 5}})
	if wc := a.wait(); wc.Status != ib.WCFlushErr || wc.ID != 5 {
		t.Errorf("%+v", wc)
	}
}

// In INIT nothing is received yet, though receives may be posted.
func TestNothingInInit(t *testing.T) {
	a, b := newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).idle()
	b.steer(toMAC(macB))
	witness := b.end()
	witness.steer(toMAC(macC))
	witness.recv(1, 100)
	if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.Init, Port: 1}, ib.AttrState|ib.AttrPort); err != nil {
		t.Fatal(err)
	}
	b.recv(2, 100)
	a.send(ethernet(macB, macA, 1, make([]byte, 50)...), 20, 0)
	a.send(ethernet(macC, macA, 1, make([]byte, 50)...), 20, 0)
	witness.wait()
	b.nothing()
	if err := b.q.Modify(t.Context(), &ib.QPAttr{State: ib.RTR}, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	a.send(ethernet(macB, macA, 2, make([]byte, 50)...), 20, 0)
	if b.wait(); b.got(0, 100, 14)[13] != 2 {
		t.Error("the frame from before")
	}
}

// Queue pairs of one context hear each other if they want to, those of another context of the device always.
func TestLoopback(t *testing.T) {
	c := newCard(t, mlx5emu.Config{})
	one, two := newHost(t, c), newHost(t, c)
	a, deaf, b := one.end(), one.end(), two.end()
	loop := one.end(func(cfg *qp.Config) { cfg.Loopback = true })
	for _, e := range []*end{deaf, b, loop} {
		e.steer(toMAC(macB))
		e.recv(2, 100)
	}
	a.send(ethernet(macB, macA, 1, make([]byte, 50)...), 20, 0)
	b.wait()
	loop.wait()
	deaf.nothing()
	b.send(ethernet(macB, macB, 1, make([]byte, 50)...), 20, 0)
	deaf.wait()
	loop.wait()
	b.nothing()
}

// The switch sends frames where their receiver is, once it has heard of that.
func TestSwitch(t *testing.T) {
	a, b, c := newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).end()
	for _, e := range []*end{b, c} {
		e.steer(ib.FlowRule{})
		e.recv(5, 100)
	}
	a.send(ethernet(macB, macA, 1, make([]byte, 50)...), 20, 0)
	b.wait()
	c.wait()
	b.send(ethernet(macA, macB, 1, make([]byte, 50)...), 20, 0)
	a.send(ethernet(macB, macA, 2, make([]byte, 50)...), 20, 0)
	b.wait()
	a.send(ethernet(all, macA, 3, make([]byte, 50)...), 20, 0)
	b.wait()
	if c.wait(); c.got(1, 100, 14)[13] != 3 {
		t.Errorf("frame %d", c.got(1, 100, 14)[13])
	}
}

// Checksums that the device fills in are right, and those that it finds right are said to be.
func TestChecksums(t *testing.T) {
	a, b := newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).end()
	b.steer(toMAC(macB))
	n := 0
	for _, c := range []struct {
		name  string
		frame []byte
		right bool
	}{
		{"UDP", ipv4(macB, macA, 17, transport(17, 1, 2, 3, 4, 5)), true},
		{"UDP with a tag", tagged(1, ipv4(macB, macA, 17, transport(17, 1, 2, make([]byte, 999)...))), true},
		{"TCP", ipv4(macB, macA, 6, transport(6, 1, 2, 3, 4, 5)), true},
		{"IPv6", ipv6(macB, macA, 17, transport(17, 1, 2, 3, 4, 5)), false}, // only IPv4 is told
		{"neither", ipv4(macB, macA, 1, make([]byte, 20)), false},
		{"no IP", ethernet(macB, macA, 0x88b5, make([]byte, 80)...), false},
	} {
		for _, flags := range []ib.SendFlags{0, ib.SendChecksum} {
			b.recv(1, 1500)
			a.send(c.frame, 18, flags)
			wc := b.wait()
			if got, want := wc.Flags&ib.WCChecksumOK != 0, c.right && flags != 0; got != want || wc.Status != ib.WCSuccess {
				t.Errorf("%s, flags %v: %+v", c.name, flags, wc)
			}
			n++
		}
		// What the device has filled in is seen to be right, and with one bit changed to be wrong.
		sent := bytes.Clone(b.got(0, 1500, len(c.frame)))
		for _, change := range []byte{0, 1} {
			sent[len(c.frame)-1] ^= change
			b.recv(1, 1500)
			a.send(sent, 18, 0)
			if wc := b.wait(); (wc.Flags&ib.WCChecksumOK != 0) != (c.right && change == 0) {
				t.Errorf("%s, changed by %d: %+v", c.name, change, wc)
			}
		}
	}
	if sum := func() uint16 { // of UDP, by hand
		f := b.mem.Bytes()[b.at:]
		b.recv(1, 1500)
		a.send(ipv4(macB, macA, 17, transport(17, 0x1111, 0x2222, 0xab)), 18, ib.SendChecksum)
		b.wait()
		return binary.BigEndian.Uint16(f[14+20+6:])
	}(); sum != ^uint16(0x0a00+0x0001+0x0a00+0x0002+17+9+0x1111+0x2222+9+0xab00) {
		t.Errorf("UDP checksum %#x", sum)
	}
}

// Many frames at a time: what arrives is in order, and whole.
func TestManyFrames(t *testing.T) {
	a, b := newHost(t, newCard(t, mlx5emu.Config{})).end(), newHost(t, newCard(t, mlx5emu.Config{})).end()
	b.steer(toMAC(macB))
	const size, count = 100, 2000
	posted, sent, got := 0, 0, 0
	wcs := make([]ib.WC, 32)
	late := time.Now().Add(time.Minute)
	for got < count {
		if time.Now().After(late) {
			t.Fatalf("%d frames of %d", got, count)
		}
		for ; posted < got+64; posted++ {
			if _, err := b.q.PostRecv([]ib.RecvWR{{ID: uint64(posted), SGEs: []ib.SGE{b.mem.SGE(b.at+posted%64*size, size)}}}); err != nil {
				t.Fatal(err)
			}
		}
		for ; sent < min(got+32, count); sent++ {
			frame := ethernet(macB, macA, uint16(sent), bytes.Repeat([]byte{byte(sent)}, 86)...)
			if _, err := a.q.PostSend([]ib.SendWR{{Opcode: ib.OpSend, Flags: ib.SendSignaled, Inline: frame[:64], SGEs: nil}}); err != nil {
				t.Fatal(err)
			}
		}
		a.cq.Poll(wcs)
		n, err := b.cq.Poll(wcs)
		if err != nil {
			t.Fatal(err)
		}
		for _, wc := range wcs[:n] {
			f := b.mem.Bytes()[b.at+int(wc.ID)%64*size:][:64]
			if wc.Status != ib.WCSuccess || wc.ID != uint64(got) || wc.ByteLen != 64 || binary.BigEndian.Uint16(f[12:]) != uint16(got) || f[63] != byte(got) {
				t.Fatalf("frame %d: %+v, %x", got, wc, f)
			}
			got++
		}
	}
}
