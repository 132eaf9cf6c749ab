package rdmacm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// golden makes bytes of hexadecimal words; zN stands for N zeros.
func golden(t *testing.T, s string) []byte {
	t.Helper()
	var b []byte
	for _, w := range strings.Fields(s) {
		if n, ok := strings.CutPrefix(w, "z"); ok {
			n, err := strconv.Atoi(n)
			if err != nil {
				t.Fatal(err)
			}
			b = append(b, make([]byte, n)...)
			continue
		}
		x, err := hex.DecodeString(w)
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, x...)
	}
	return b
}

func littleEndian() bool { return binary.NativeEndian.Uint16([]byte{1, 0}) == 1 }

func must(c *command, err error) *command {
	if err != nil {
		panic(err)
	}
	return c
}

// Every command, byte by byte, as it lies at 0x10000. Sizes and offsets are those of include/uapi/rdma/rdma_user_cm.h.
func TestCommandBytes(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	four, six := netip.MustParseAddrPort("10.77.0.2:7471"), netip.MustParseAddrPort("[fe80::1%7]:7471")
	const sin4 = "0200 1d2f 0a4d0002 z8"                                        // AF_INET, the port in network order, the address
	const sin6 = "0a00 1d2f 00000000 fe800000000000000000000000000001 07000000" // AF_INET6, flow information, the scope
	param := ConnParam{QPN: 0x123456, PrivateData: []byte("abc"), SRQ: true, ResponderResources: 4, InitiatorDepth: 5,
		FlowControl: true, RetryCount: 6, RNRRetryCount: 7}
	const connParam = "56341200 00000000 616263 z253 03 01 04 05 01 06 07 01"
	for _, c := range []struct {
		name string
		cmd  *command
		want string
		ref  string // what lies at the address in the command
	}{
		{"create_id, TCP", createID(7, TCP, &abi.CMCreateIDResp{}),
			"00000000 1800 0400 0700000000000000 2000010000000000 0601 02 z5", "z4"},
		{"create_id, UDP", createID(0x1122334455667788, UDP, &abi.CMCreateIDResp{}),
			"00000000 1800 0400 8877665544332211 2000010000000000 1101 04 z5", "z4"},
		{"destroy_id", destroyID(3), "01000000 1000 0400 1800010000000000 03000000 00000000", "z4"},
		{"bind", must(bind(3, four)), "14000000 8800 0000 03000000 1000 0000" + " " + sin4 + " z112", ""},
		{"bind, IPv6", must(bind(3, six)), "14000000 8800 0000 03000000 1c00 0000" + " " + sin6 + " z100", ""},
		{"bind, mapped", must(bind(3, netip.MustParseAddrPort("[::ffff:10.77.0.2]:7471"))),
			"14000000 8800 0000 03000000 1000 0000" + " " + sin4 + " z112", ""},
		{"resolve_addr", must(resolveAddr(3, netip.AddrPort{}, four, 2000)),
			"15000000 1001 0000 03000000 d0070000 0000 1000 00000000 z128 " + sin4 + " z112", ""},
		{"resolve_addr from", must(resolveAddr(3, netip.MustParseAddrPort("10.77.0.1:0"), four, 2000)),
			"15000000 1001 0000 03000000 d0070000 1000 1000 00000000 0200 0000 0a4d0001 z120 " + sin4 + " z112", ""},
		{"resolve_route", resolveRoute(3, 2000), "04000000 0800 0000 03000000 d0070000", ""},
		{"connect", must(connect(3, &param, 56)), "06000000 2001 0000 " + connParam + " 03000000 00000000 z8", ""},
		{"listen", listen(3, 128), "07000000 0800 0000 03000000 80000000", ""},
		{"accept", must(accept(3, 9, &param, 196)),
			"08000000 2801 0000 0900000000000000 " + connParam + " 03000000 00000000 z8", ""},
		{"establish", must(accept(3, 9, nil, 0)), "08000000 2801 0000 0900000000000000 z272 03000000 00000000 z8", ""},
		{"reject", must(reject(3, []byte("no"), 148)), "09000000 0801 0000 03000000 02 00 0000 6e6f z254", ""},
		{"disconnect", disconnect(3), "0a000000 0400 0000 03000000", ""},
		{"init_qp_attr", initQPAttr(3, ib.RTR, &abi.QPAttr{}),
			"0b000000 1000 9000 1800010000000000 03000000 02000000", "z144"},
		{"get_event", getEvent(make([]byte, eventSize)), "0c000000 0800 5001 1000010000000000", "z336"},
		{"set_option, u8", setOption("set_tos", 3, abi.RDMA_OPTION_ID_TOS, []byte{0x20}),
			"0e000000 1800 0000 2000010000000000 03000000 00000000 00000000 01000000", "20"},
		{"set_option, int", setOption("set_afonly", 3, abi.RDMA_OPTION_ID_AFONLY, intValue(true)),
			"0e000000 1800 0000 2000010000000000 03000000 00000000 02000000 04000000", "01000000"},
		{"notify", notify(3, ib.EventCommEst), "0f000000 0800 0000 03000000 04000000", ""},
		{"query", queryAddr(3, &abi.CMQueryAddrResp{}),
			"13000000 1000 1801 1800010000000000 03000000 00000000", "z272 ffffffff z4"},
	} {
		s := slot{mem: bytes.Repeat([]byte{0xee}, slotSize), addr: 0x10000}
		n, ref := s.marshal(c.cmd)
		if got, want := s.mem[:n], golden(t, c.want); !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%swant\n%s", c.name, hex.Dump(got), hex.Dump(want))
		}
		if got, want := s.mem[ref:][:len(c.cmd.ref)], golden(t, c.ref); !bytes.Equal(got, want) || ref%8 != 0 {
			t.Errorf("%s: the command refers to (at %d)\n%swant\n%s", c.name, ref, hex.Dump(got), hex.Dump(want))
		}
		// The response comes back to where the command has it from.
		for i := range c.cmd.ref {
			s.mem[ref+i] = byte(i)
		}
		s.unmarshal(c.cmd, ref)
		for i, b := range c.cmd.ref {
			if b != byte(i) {
				t.Errorf("%s: byte %d of the response is %#x", c.name, i, b)
				break
			}
		}
	}
}

// What does not fit is refused before the kernel sees it.
func TestCommandsRefused(t *testing.T) {
	four, six := netip.MustParseAddrPort("10.77.0.2:1"), netip.MustParseAddrPort("[fd00::1]:1")
	long := make([]byte, 300)
	for name, f := range map[string]func() (*command, error){
		"no address":      func() (*command, error) { return bind(1, netip.AddrPort{}) },
		"no destination":  func() (*command, error) { return resolveAddr(1, four, netip.AddrPort{}, 1) },
		"two families":    func() (*command, error) { return resolveAddr(1, four, six, 1) },
		"no such zone":    func() (*command, error) { return bind(1, netip.MustParseAddrPort("[fe80::1%no-such-zone]:1")) },
		"source's zone":   func() (*command, error) { return resolveAddr(1, netip.MustParseAddrPort("[fe80::1%none]:1"), six, 1) },
		"too much data":   func() (*command, error) { return connect(1, &ConnParam{PrivateData: long}, MaxPrivateData) },
		"too much more":   func() (*command, error) { return accept(1, 1, &ConnParam{PrivateData: long[:137]}, MaxUDPAcceptData) },
		"too long a no":   func() (*command, error) { return reject(1, long, MaxPrivateData) },
		"no QP number":    func() (*command, error) { return connect(1, &ConnParam{QPN: 1 << 24}, MaxPrivateData) },
		"retry count":     func() (*command, error) { return connect(1, &ConnParam{RetryCount: 8}, MaxPrivateData) },
		"RNR retry count": func() (*command, error) { return connect(1, &ConnParam{RNRRetryCount: 8}, MaxPrivateData) },
		"zone destination": func() (*command, error) {
			return resolveAddr(1, netip.AddrPort{}, netip.MustParseAddrPort("[fe80::1%none]:1"), 1)
		},
	} {
		if c, err := f(); err == nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// An event of each kind of parameters, as the kernel writes it.
func TestDecodeEvent(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	b := golden(t, "0900000000000000 03000000 04000000 00000000"+
		" 56341200 00000000 616263 z253 38 01 04 05 01 06 07 00 z32 z12")
	e, err := decodeEvent(b)
	if err != nil || e.uid != 9 || e.id != 3 || e.kind != EventConnectRequest || e.status != 0 {
		t.Fatalf("%+v, %v", e, err)
	}
	p, err := e.conn()
	if err != nil || p.QPN != 0x123456 || len(p.PrivateData) != 56 || string(p.PrivateData[:3]) != "abc" || !p.SRQ ||
		p.ResponderResources != 4 || p.InitiatorDepth != 5 || !p.FlowControl || p.RetryCount != 6 || p.RNRRetryCount != 7 {
		t.Errorf("%+v, %v", p, err)
	}

	b = golden(t, "0900000000000000 03000000 09000000 00000000"+
		" 56341200 67452301 fd000000000000000000000000000001 05000000 02 40 08 00 0700 03 00 00 01 01 00"+
		" 78797a z253 88 z7 z12")
	if e, err = decodeEvent(b); err != nil {
		t.Fatal(err)
	}
	u, err := e.ud()
	if err != nil || u.QPN != 0x123456 || u.QKey != UDPQKey || u.AH.DGID.String() != "fd00:0000:0000:0000:0000:0000:0000:0001" ||
		u.AH.FlowLabel != 5 || u.AH.SGIDIndex != 2 || u.AH.HopLimit != 0x40 || u.AH.TrafficClass != 8 || u.AH.DLID != 7 ||
		u.AH.SL != 3 || u.AH.Port != 1 || len(u.PrivateData) != 136 || string(u.PrivateData[:3]) != "xyz" {
		t.Errorf("%+v, %v", u, err)
	}

	b = golden(t, "0900000000000000 03000000 07000000 92ffffff z316") // unreachable, -ETIMEDOUT
	if e, err = decodeEvent(b); err != nil || e.status != -110 {
		t.Errorf("%+v, %v", e, err)
	}
	if _, err := decodeEvent(b[:335]); err == nil {
		t.Error("a short event")
	}
	binary.NativeEndian.PutUint32(b[20:], 1<<24)
	e, _ = decodeEvent(b)
	_, err1 := e.conn()
	_, err2 := e.ud()
	if err1 == nil || err2 == nil {
		t.Error("a QP number of 25 bits")
	}
}

func TestQPAttr(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	// RTR as the kernel answers it, with the bits above 20 of old kernels, and an alternate path.
	var r abi.QPAttr
	copy(bytesOf(&r), golden(t, "81d1b201 02000000 00000000 05000000 00000000 00000000 11000000 22000000 33000000 0e000000"+
		" 00000000000000000000ffff0a4d0002 00000000 01 40 00 00 0000 00 00 00 01 01 00"+
		" z32 z20 0000 0000 00 00 03 04 00 01 0e 07 06 00 00 z5"))
	a, mask, err := qpAttr(&r, ib.RTR)
	want := ib.AttrState | ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN | ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer
	if err != nil || mask != want {
		t.Errorf("mask %v, %v", mask, err)
	}
	if a.State != ib.RTR || a.PathMTU != ib.MTU4096 || a.RQPSN != 0x11 || a.SQPSN != 0x22 || a.DestQPN != 0x33 || a.Access != 14 ||
		a.AH.DGID.Addr() != netip.MustParseAddr("10.77.0.2") || a.AH.SGIDIndex != 1 || a.AH.HopLimit != 0x40 || a.AH.Port != 1 ||
		a.MaxRdAtomic != 3 || a.MaxDestRdAtomic != 4 || a.Port != 1 || a.AckTimeout != 14 || a.RetryCount != 7 || a.RNRRetry != 6 {
		t.Errorf("%+v", a)
	}
	for name, change := range map[string]func(*abi.QPAttr){
		"another state": func(r *abi.QPAttr) { r.QPState = 3 },
		"MTU":           func(r *abi.QPAttr) { r.PathMTU = 6 },
		"large MTU":     func(r *abi.QPAttr) { r.PathMTU = 0x105 },
		"peer":          func(r *abi.QPAttr) { r.DestQPNum = 1 << 24 },
		"PSN":           func(r *abi.QPAttr) { r.RQPSN = 1 << 24 },
		"send PSN":      func(r *abi.QPAttr) { r.QPAttrMask |= uint32(ib.AttrSQPSN); r.SQPSN = 1 << 24 },
	} {
		bad := r
		change(&bad)
		if _, _, err := qpAttr(&bad, ib.RTR); err == nil {
			t.Errorf("%s was believed", name)
		}
	}
}

func TestAddrOf(t *testing.T) {
	if !littleEndian() {
		t.Skip("the golden bytes are little-endian")
	}
	var r abi.CMQueryAddrResp
	copy(bytesOf(&r), golden(t, "0200a5fffe4d0001 01 00 ffff 1000 1c00 0200 1d2f 0a4d0002 z120"+
		" 0a00 1d30 00000000 fd000000000000000000000000000001 00000000 z100 02000000 00000000"))
	a, err := addrOf(&r)
	want := Addr{Local: netip.MustParseAddrPort("10.77.0.2:7471"), Remote: netip.MustParseAddrPort("[fd00::1]:7472"),
		Bound: true, NodeGUID: 0x0200a5fffe4d0001, Port: 1, PKey: 0xffff, DeviceIndex: 2, HasDeviceIndex: true}
	if err != nil || a != want {
		t.Errorf("%+v, %v", a, err)
	}
	r.IbdevIndex = noIndex // an old kernel has not written it
	if a, err := addrOf(&r); err != nil || a.HasDeviceIndex || a.DeviceIndex != 0 || !a.Bound {
		t.Errorf("%+v, %v", a, err)
	}
	r.PortNum = 0
	if a, err := addrOf(&r); err != nil || a.Bound || a.NodeGUID != 0 {
		t.Errorf("%+v, %v", a, err)
	}
	r.SrcSize, r.DstSize = 0, 0
	if a, err := addrOf(&r); err != nil || a != (Addr{}) {
		t.Errorf("%+v, %v", a, err)
	}
	for _, change := range []func(*abi.CMQueryAddrResp){
		func(r *abi.CMQueryAddrResp) { r.SrcSize = 28 },
		func(r *abi.CMQueryAddrResp) { r.SrcSize = 0xffff },
		func(r *abi.CMQueryAddrResp) { r.SrcSize, r.SrcAddr.SSFamily = 48, 27 }, // AF_IB
	} {
		bad := r
		change(&bad)
		if _, err := addrOf(&bad); err == nil {
			t.Errorf("an address of family %d and %d bytes", bad.SrcAddr.SSFamily, bad.SrcSize)
		}
	}
}

// Addresses survive the way to the kernel and back.
func TestSockaddr(t *testing.T) {
	for _, s := range []string{"10.77.0.2:7471", "0.0.0.0:0", "[::]:1", "[fd00::1]:65535", "[fe80::1%4294967295]:2"} {
		want := netip.MustParseAddrPort(s)
		var b abi.SockaddrStorage
		n, err := putSockaddr(&b, want)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := sockaddr(&b, n); err != nil || got != want {
			t.Errorf("%v came back as %v, %v", want, got, err)
		}
	}
}

func FuzzEvent(f *testing.F) {
	f.Add(make([]byte, eventSize))
	f.Add(bytes.Repeat([]byte{0xff}, eventSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEvent(b)
		if err != nil {
			return
		}
		if p, err := e.conn(); err == nil && (p.QPN > ib.MaxQPN || len(p.PrivateData) > MaxPrivateData || p.RetryCount > 7) {
			t.Errorf("%+v", p)
		}
		if p, err := e.ud(); err == nil && (p.QPN > ib.MaxQPN || len(p.PrivateData) > MaxPrivateData) {
			t.Errorf("%+v", p)
		}
		e.udPrivateData()
		for _, ps := range []PortSpace{TCP, UDP} {
			if err := e.failure(ps); err == nil || err.Error() == "" {
				t.Errorf("event %v, status %d is no error", e.kind, e.status)
			}
		}
	})
}

func FuzzQueries(f *testing.F) {
	f.Add(make([]byte, 280), make([]byte, 144))
	f.Add(bytes.Repeat([]byte{0xff}, 280), bytes.Repeat([]byte{0xff}, 144))
	f.Fuzz(func(t *testing.T, addr, attr []byte) {
		var r abi.CMQueryAddrResp
		copy(bytesOf(&r), addr)
		if a, err := addrOf(&r); err == nil && a.Bound != (a.Port != 0) {
			t.Errorf("%+v", a)
		}
		var q abi.QPAttr
		copy(bytesOf(&q), attr)
		a, mask, err := qpAttr(&q, ib.RTR)
		if err == nil && (mask>>21 != 0 || a.State != ib.RTR || mask&ib.AttrPathMTU != 0 && a.PathMTU.Bytes() == 0) {
			t.Errorf("%+v, %v", a, mask)
		}
	})
}
