//go:build amd64 || arm64

package mlx5

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Of a device: what it says of raw packet queue pairs.
func minInline(mode uint8) func(*fakeKernel) {
	return func(k *fakeKernel) { k.resp.EthMinInline, k.caps = mode, 1<<26|1<<29 }
}

const (
	inlineUnsaid = 0
	inlineNone   = 1
	inlineL2     = 2
)

// numbers is n bytes that count.
func numbers(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i + 1)
	}
	return b
}

// The bytes of requests that send frames.
func TestFrameElements(t *testing.T) {
	for _, c := range []struct {
		name string
		mode uint8
		wr   ib.SendWR
		want string
	}{
		{"all inline", inlineNone, ib.SendWR{Inline: numbers(20), Flags: ib.SendSignaled},
			`0000000a 00010004 00000008 00000000 00000000 00000000 00000000 00000000
			80000014 01020304 05060708 090a0b0c 0d0e0f10 11121314`},
		{"all inline, of which the device wants some", inlineL2, ib.SendWR{Inline: numbers(20)},
			`0000000a 00010004 00000000 00000000 00000000 00000000 00000000 00120102 03040506 0708090a 0b0c0d0e 0f101112 80000002 1314`},
		{"no more than the device wants", inlineL2, ib.SendWR{Inline: numbers(18)},
			`0000000a 00010003 00000000 00000000 00000000 00000000 00000000 00120102 03040506 0708090a 0b0c0d0e 0f101112`},
		{"a device that does not say", inlineUnsaid, ib.SendWR{Inline: numbers(18)},
			`0000000a 00010003 00000000 00000000 00000000 00000000 00000000 00120102 03040506 0708090a 0b0c0d0e 0f101112`},
		{"elements", inlineNone, ib.SendWR{SGEs: []ib.SGE{sge(0x1000, 15), sge(1, 0), sge(0x2000, 6)}},
			`0000000a 00010004 00000000 00000000 00000000 00000000 00000000 00000000
			0000000f 00004200 0000000000001000 00000006 00004200 0000000000002000`},
		{"a header, and an element", inlineL2, ib.SendWR{Inline: numbers(18), SGEs: []ib.SGE{sge(0x1000, 50)}, Flags: ib.SendChecksum},
			`0000000a 00010004 00000000 00000000 00000000 c0000000 00000000 00120102 03040506 0708090a 0b0c0d0e 0f101112
			00000032 00004200 0000000000001000`},
		{"a longer header", inlineNone, ib.SendWR{Inline: numbers(22), SGEs: []ib.SGE{sge(0x1000, 50)}},
			`0000000a 00010005 00000000 00000000 00000000 00000000 00000000 00160102 03040506 0708090a 0b0c0d0e 0f101112
			13141516 00000000 00000000 00000000 00000032 00004200 0000000000001000`},
		{"a header of two bytes", inlineNone, ib.SendWR{Inline: numbers(2), SGEs: []ib.SGE{sge(0x1000, 50)}},
			`0000000a 00010003 00000000 00000000 00000000 00000000 00000000 00020102 00000032 00004200 0000000000001000`},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := bare(t, minInline(c.mode)).with(ib.RawPacket)
			c.wr.Opcode = ib.OpSend
			b.post(c.wr)
			b.wrote(c.name, c.want)
		})
	}
}

// What cannot be a frame.
func TestFramesRefused(t *testing.T) {
	some := []ib.SGE{sge(0x1000, 100)}
	for _, c := range []struct {
		name string
		mode uint8
		wr   ib.SendWR
		want error
	}{
		{"too little inline", inlineL2, ib.SendWR{Opcode: ib.OpSend, Inline: numbers(17), SGEs: some}, errFrameInline},
		{"nothing inline", inlineUnsaid, ib.SendWR{Opcode: ib.OpSend, SGEs: some}, errFrameInline},
		{"too much inline", inlineNone, ib.SendWR{Opcode: ib.OpSend, Inline: numbers(1000)}, errFrameLong},
		{"no header", inlineNone, ib.SendWR{Opcode: ib.OpSend, Inline: numbers(5), SGEs: []ib.SGE{sge(1, 8)}}, errFrameShort},
		{"nothing", inlineNone, ib.SendWR{Opcode: ib.OpSend}, errFrameShort},
		{"too many elements", inlineNone, ib.SendWR{Opcode: ib.OpSend, SGEs: make([]ib.SGE, 5)}, driver.ErrTooManySGEs},
		{"an element of 2 GiB", inlineNone, ib.SendWR{Opcode: ib.OpSend, SGEs: []ib.SGE{sge(0, 1<<31)}}, errSGELen},
		{"immediate data", inlineNone, ib.SendWR{Opcode: ib.OpSendWithImm, SGEs: some}, driver.ErrOpcode},
		{"an opcode that looks like SEND", inlineNone, ib.SendWR{Opcode: ib.OpSend + 16, SGEs: some}, driver.ErrOpcode},
		{"WRITE", inlineNone, ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: some}, driver.ErrOpcode},
	} {
		b := bare(t, minInline(c.mode)).with(ib.RawPacket)
		n, err := b.qp.PostSend([]ib.SendWR{c.wr})
		if n != 0 || !errors.Is(err, c.want) || !errors.Is(err, driver.ErrInvalidWR) {
			t.Errorf("%s: %d, %v, want %v", c.name, n, err, c.want)
		}
	}
	b := bare(t, func(k *fakeKernel) { k.resp.EthMinInline = inlineNone }).with(ib.RawPacket)
	if _, err := b.qp.PostSend([]ib.SendWR{{Opcode: ib.OpSend, SGEs: some, Flags: ib.SendChecksum}}); !errors.Is(err, errNoChecksum) {
		t.Errorf("checksums that the device does not have: %v", err)
	}
}

// Requests of all lengths of headers go around the end of the queue.
func TestFramesAround(t *testing.T) {
	b := bare(t, minInline(inlineL2)).with(ib.RawPacket, func(cfg *driver.QPConfig) { cfg.Cap.MaxSendWR, cfg.Cap.MaxInline = 8, 200 })
	for i := range 400 {
		head := bytes.Repeat([]byte{byte(i)}, 18+i%(b.qp.inline-17))
		wr := ib.SendWR{Opcode: ib.OpSend, Inline: head, Flags: ib.SendSignaled}
		if i%3 > 0 {
			wr.SGEs = []ib.SGE{sge(0x1000, 7), sge(0x2000, uint32(i))}[:i%3]
		}
		b.post(wr)
		w := b.kq.complete()[0]
		n := int(be.Uint16(w[28:]))
		got, rest := w[30:][:n], w[16+(14+n+15)&^15:]
		if i%3 == 0 && len(head) > 18 {
			k := be.Uint32(rest) &^ (1 << 31)
			got, rest = append(got[:18:18], rest[4:][:k]...), nil
		}
		if !bytes.Equal(got, head) {
			t.Fatalf("frame %d: %x, want %x", i, got, head)
		}
		for j := range wr.SGEs {
			s := rest[16*j:]
			if be.Uint32(s) != wr.SGEs[j].Length || be.Uint32(s[4:]) != 0x4200 || be.Uint64(s[8:]) != wr.SGEs[j].Addr {
				t.Fatalf("frame %d: element %d is %x", i, j, s[:16])
			}
		}
		b.poll(1)
	}
}

// The largest requests that a queue pair is made for are posted, and fit.
func TestLargestFrames(t *testing.T) {
	for _, mode := range []uint8{inlineNone, inlineL2} {
		for inline := 0; inline < 500; inline += 97 {
			for sges := 0; sges < 20; sges += 3 {
				b := bare(t, minInline(mode)).with(ib.RawPacket, func(cfg *driver.QPConfig) { cfg.Cap.MaxInline, cfg.Cap.MaxSendSGE = inline, sges })
				if b.qp.inline < max(inline, b.c.info.minInline) {
					t.Fatalf("%d bytes of %d", b.qp.inline, inline)
				}
				most := b.qp.QPInfo.Cap.MaxSendWR
				wr := ib.SendWR{Opcode: ib.OpSend, Inline: numbers(b.qp.inline), SGEs: make([]ib.SGE, sges)}
				if b.qp.inline+sges < shortestSend {
					continue
				}
				for i := range wr.SGEs {
					wr.SGEs[i] = sge(0x1000, 1)
				}
				for range most {
					b.post(wr)
				}
				if n := int(b.kq.sends()); n > len(b.kq.sq)/64 {
					t.Fatalf("%d requests of %d bytes and %d elements take %d blocks of %d", most, b.qp.inline, sges, n, len(b.kq.sq)/64)
				}
			}
		}
	}
	b := bare(t, minInline(inlineNone))
	_, err := b.pd.CreateQP(b.config(ib.RawPacket, func(cfg *driver.QPConfig) { cfg.Cap.MaxInline, cfg.Cap.MaxSendSGE = 800, 20 }))
	if err == nil || !strings.Contains(err.Error(), "800 bytes of inline data and 20 SGEs") {
		t.Errorf("requests that do not fit the device: %v", err)
	}
}

// The command, and what the kernel is told of memory that is apart.
func TestCreateRaw(t *testing.T) {
	b := bare(t, minInline(inlineNone)).with(ib.RawPacket, func(cfg *driver.QPConfig) { cfg.Loopback = true })
	u := b.kq.request
	buf, sq := le.Uint64(u), le.Uint64(u[40:])
	if sq%4096 != 0 || sq < buf+uint64(len(b.kq.rq)) {
		t.Errorf("receives at %#x, %d bytes, sends at %#x", buf, len(b.kq.rq), sq)
	}
	if flags := le.Uint32(u[28:]); flags != 1<<10|1<<6|1<<7 {
		t.Errorf("flags %#x", flags)
	}
	if p := b.qp.Path(); p != "ethernet" {
		t.Errorf("path %q", p)
	}
	for _, c := range []struct {
		name   string
		change func(*fakeKernel)
	}{
		{"InfiniBand", func(k *fakeKernel) { k.link = 1 }},
		{"completions without index", func(k *fakeKernel) { k.resp.CQEVersion = 0 }},
	} {
		b := bare(t, minInline(inlineNone), c.change)
		if _, err := b.pd.CreateQP(b.config(ib.RawPacket)); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", c.name, err)
		}
		a, err := b.c.QueryDevice()
		if err != nil || a.Caps&(ib.CapRawPacket|ib.CapFlowSteering|ib.CapFrameChecksum) != 0 {
			t.Errorf("%s: capabilities %v, %v", c.name, a.Caps, err)
		}
	}
	for mode, want := range map[uint8]int{inlineUnsaid: 18, inlineNone: 0, inlineL2: 18, 3: 18} {
		a, err := bare(t, minInline(mode)).c.QueryDevice()
		if err != nil || a.MinFrameInline != want || !a.Caps.Has(ib.CapRawPacket|ib.CapFlowSteering|ib.CapFrameChecksum) {
			t.Errorf("mode %d: %d bytes, %v, %v", mode, a.MinFrameInline, a.Caps, err)
		}
	}
	b.k.Errs[24] = syscall.EPERM
	if _, err := b.pd.CreateQP(b.config(ib.RawPacket)); !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "CAP_NET_RAW") {
		t.Errorf("without the right: %v", err)
	}
}

// The device hears of receives in RTR, and not before.
func TestReceivesWithheld(t *testing.T) {
	b := bare(t, minInline(inlineNone)).with(ib.RawPacket)
	record := func() uint32 { return be.Uint32(b.kq.record) }
	for range 2 {
		b.to(b.qp, ib.Reset)
		b.to(b.qp, ib.Init)
		b.recv(ib.RecvWR{ID: 1}, ib.RecvWR{ID: 2})
		if n := record(); n != 0 {
			t.Fatalf("%d receives in INIT", n)
		}
		b.to(b.qp, ib.RTR)
		if n := record(); n != 2 {
			t.Fatalf("%d receives in RTR", n)
		}
		b.recv(ib.RecvWR{ID: 3})
		if n := record(); n != 3 {
			t.Fatalf("%d receives after one more", n)
		}
		c := b.kq.cqeOf(2, 0)
		be.PutUint32(c[44:], 64)
		b.kc.add(c)
		b.poll(1)
	}
}

// Completions of frames that came in: they have no number of the queue pair, but flags.
func TestFrameCompletions(t *testing.T) {
	b := bare(t, minInline(inlineNone)).with(ib.RawPacket)
	for i, c := range []struct {
		right, kind byte
		want        ib.WCFlags
	}{{0, 0, 0}, {6, 8, ib.WCChecksumOK}, {6, 8 | 0xf3, ib.WCChecksumOK}, {2, 8, 0}, {4, 8, 0}, {6, 4, 0}, {0xf9, 8, 0}} {
		b.recv(ib.RecvWR{ID: uint64(i)})
		e := b.kq.cqeOf(2, uint16(i))
		be.PutUint32(e[56:], 0xabcd) // a flow tag
		be.PutUint32(e[44:], 1500)
		e[28], e[29] = c.right, c.kind
		b.kc.add(e)
		if got, want := b.poll(1)[0], (ib.WC{ID: uint64(i), Opcode: ib.WCRecv, Flags: c.want, ByteLen: 1500, QPN: b.qp.QPN()}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	b.recv(ib.RecvWR{ID: 9})
	e := b.kq.cqeOf(14, 7)
	be.PutUint32(e[56:], 0xabcd)
	e[55] = 5
	b.kc.add(e)
	if got := b.poll(1)[0]; got.ID != 9 || got.Status != ib.WCFlushErr {
		t.Errorf("%+v", got)
	}
	// Requests have the number, and it counts.
	b.post(ib.SendWR{Opcode: ib.OpSend, Inline: numbers(20), Flags: ib.SendSignaled})
	_, done := b.kq.takeSend()
	be.PutUint32(done[56:], 0x0a<<24|0xabcd)
	b.kc.add(done)
	if n := b.cq.Poll(make([]ib.WC, 1)); n != -1 || !errors.Is(b.cq.Err(), ErrDevice) {
		t.Errorf("%d, %v", n, b.cq.Err())
	}
}

// Rules as commands have them.
func TestFlowCommand(t *testing.T) {
	b := bare(t, minInline(inlineNone)).with(ib.RawPacket)
	for _, c := range []struct {
		name string
		rule ib.FlowRule
		want string // behind the handle, in the byte order of numbers
	}{
		{"all that is left", ib.FlowRule{Kind: ib.FlowDefault, Port: 1}, `01000000 0000 0000 00 0000 01 00000000`},
		{"all", ib.FlowRule{Port: 2, Priority: 3}, `00000000 0000 0300 00 0000 02 00000000`},
		{"Ethernet", ib.FlowRule{Port: 1, Eth: &ib.FlowFilter[ib.FlowEth]{Value: ib.FlowEth{Dst: ib.MAC{1, 2, 3, 4, 5, 6}, Src: ib.MAC{7, 8, 9, 10, 11, 12}, Type: 0x0800, VLAN: 5},
			Mask: ib.FlowEth{Dst: ib.MAC{255, 255, 255, 255, 255, 255}, VLAN: 0xfff}}},
			`00000000 2800 0000 01 0000 01 00000000 20000000 2800 0000 010203040506 0708090a0b0c 0800 0005 ffffffffffff 000000000000 0000 0fff`},
		{"UDP", ib.FlowRule{Port: 1, IPv4: &ib.FlowFilter[ib.FlowIPv4]{Value: ib.FlowIPv4{Src: [4]byte{10, 0, 0, 1}, Dst: [4]byte{10, 0, 0, 2}, Protocol: 17, TOS: 4}, Mask: ib.FlowIPv4{Dst: [4]byte{255, 255, 255, 0}}},
			UDP: &ib.FlowFilter[ib.FlowPorts]{Value: ib.FlowPorts{Dst: 4791, Src: 1}, Mask: ib.FlowPorts{Dst: 0xffff}}},
			`00000000 3000 0000 02 0000 01 00000000 30000000 2000 0000 0a000001 0a000002 11 04 00 00 00000000 ffffff00 00 00 00 00
			41000000 1000 0000 12b7 0001 ffff 0000`},
		{"TCP", ib.FlowRule{Port: 1, IPv6: &ib.FlowFilter[ib.FlowIPv6]{Value: ib.FlowIPv6{Src: [16]byte{15: 1}, Dst: [16]byte{15: 2}, FlowLabel: 0x12345, NextHeader: 6, TrafficClass: 9}},
			TCP: &ib.FlowFilter[ib.FlowPorts]{Value: ib.FlowPorts{Src: 80}}},
			`00000000 6800 0000 02 0000 01 00000000 31000000 5800 0000 00000000000000000000000000000001 00000000000000000000000000000002 00012345 06 09 00 00` +
				strings.Repeat("00", 40) + `40000000 1000 0000 0000 0050 0000 0000`},
	} {
		f, err := b.qp.Steer(&c.rule)
		if err != nil {
			t.Fatal(err)
		}
		head := make([]byte, 8)
		le.PutUint32(head[4:], b.qp.Handle)
		if want := append(head, unhex(t, c.want)...); !bytes.Equal(b.k.flow, want) {
			t.Errorf("%s:\n got %x\nwant %x", c.name, b.k.flow, want)
		}
		b.close(f)
	}
	b.k.Errs[0x80000032] = syscall.EPERM
	if _, err := b.qp.Steer(&ib.FlowRule{Port: 1}); !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "CAP_NET_RAW") {
		t.Errorf("without the right: %v", err)
	}
}

// Frames are sent and received without memory of Go's.
func TestFramesWithoutAllocation(t *testing.T) {
	b := bare(t, minInline(inlineL2)).with(ib.RawPacket)
	wrs := []ib.SendWR{{Opcode: ib.OpSend, Inline: numbers(18), SGEs: []ib.SGE{sge(0x1000, 50)}, Flags: ib.SendSignaled}}
	bad := []ib.SendWR{{Opcode: ib.OpSend, Inline: numbers(5)}}
	recvs := []ib.RecvWR{{SGEs: []ib.SGE{sge(0x1000, 50)}}}
	wcs := make([]ib.WC, 4)
	count := uint16(0)
	if n := testing.AllocsPerRun(200, func() {
		if n, err := b.qp.PostSend(wrs); n != 1 {
			t.Fatal(err)
		}
		b.qp.PostSend(bad)
		if n, err := b.qp.PostRecv(recvs); n != 1 {
			t.Fatal(err)
		}
		done := b.kq.cqeOf(cqeRequest, count) // a request takes a block
		done[56] = codeSend
		b.kc.add(done)
		b.kc.add(b.kq.cqeOf(cqeRecv, count))
		count++
		if n := b.cq.Poll(wcs); n != 2 {
			t.Fatal(n, b.cq.Err())
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
