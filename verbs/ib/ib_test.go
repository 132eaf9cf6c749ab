package ib

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestPSN(t *testing.T) {
	for _, c := range []struct {
		p    PSN
		n    int32
		want PSN
	}{{0, 1, 1}, {MaxPSN, 1, 0}, {0, -1, MaxPSN}, {5, 1 << 24, 5}, {5, -1 << 24, 5}, {MaxPSN, -1, MaxPSN - 1}} {
		if got := c.p.Add(c.n); got != c.want {
			t.Errorf("%#x + %d = %#x, want %#x", c.p, c.n, got, c.want)
		}
	}
	for _, c := range []struct {
		p, q PSN
		want bool
	}{{0, 1, true}, {1, 0, false}, {5, 5, false}, {MaxPSN, 0, true}, {0, MaxPSN, false}, {0, 1<<23 - 1, true}, {MaxPSN - 10, 20, true}} {
		if got := c.p.Before(c.q); got != c.want {
			t.Errorf("%#x before %#x: %t", c.p, c.q, got)
		}
	}
}

func TestMTU(t *testing.T) {
	for _, c := range []struct {
		n    int
		want MTU
	}{{0, 0}, {255, 0}, {256, MTU256}, {1023, MTU512}, {1024, MTU1024}, {4095, MTU2048}, {4096, MTU4096}, {1 << 20, MTU4096}} {
		if got := MTUFor(c.n); got != c.want {
			t.Errorf("MTUFor(%d) = %d", c.n, uint8(got))
		}
	}
	for m, want := range map[MTU]int{0: 0, MTU256: 256, MTU512: 512, MTU1024: 1024, MTU2048: 2048, MTU4096: 4096, 6: 0, 255: 0} {
		if m.Bytes() != want || m.String() != fmt.Sprint(want) {
			t.Errorf("MTU %d: %d bytes, %s", uint8(m), m.Bytes(), m)
		}
	}
}

// What comes back from the wire's encoding is at least what was asked for, and the next shorter one is less.
func TestTimers(t *testing.T) {
	for d := time.Microsecond; d < time.Hour; d = d*5/4 + 1 {
		a := AckTimeoutFor(d)
		if a.Duration() < d && a != 31 || a > 1 && (a-1).Duration() >= d {
			t.Errorf("AckTimeoutFor(%v) = %v", d, a.Duration())
		}
		r := RNRTimerFor(d)
		if r.Duration() < d && r != 0 || r > 1 && (r-1).Duration() >= d {
			t.Errorf("RNRTimerFor(%v) = %v", d, r.Duration())
		}
	}
	if AckTimeoutFor(0) != 0 || AckTimeoutFor(-1) != 0 || AckTimeout(0).Duration() != 0 {
		t.Error("0 is for ever")
	}
	if d := AckTimeout(14).Duration(); d != 67108864*time.Nanosecond { // what everybody uses: 67 ms
		t.Error(d)
	}
	if d := RNRTimer(0).Duration(); d != 655360*time.Microsecond {
		t.Error(d)
	}
	if d := RNRTimer(1).Duration(); d != 10*time.Microsecond {
		t.Error(d)
	}
	if d := RNRTimer(31).Duration(); d != 491520*time.Microsecond {
		t.Error(d)
	}
}

func TestAccess(t *testing.T) {
	for _, a := range []Access{0, AccessLocalWrite, AccessRemoteRead, AccessLocalWrite | AccessRemote, AccessMWBind | AccessZeroBased | AccessOnDemand | AccessHugeTLB | AccessRelaxedOrdering,
		AccessFlushGlobal | AccessFlushPersistent} {
		if err := a.Check(); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	for _, a := range []Access{AccessRemoteWrite, AccessRemoteAtomic, AccessRemote, 1 << 10, 1 << 31} {
		if err := a.Check(); err == nil {
			t.Errorf("%s is allowed", a)
		}
	}
	for a, want := range map[Access]string{0: "local-read", AccessLocalWrite | AccessRemoteRead: "local-write|remote-read", 1 << 30: "0x40000000"} {
		if a.String() != want {
			t.Errorf("%d: %s", uint32(a), a)
		}
	}
}

func TestGID(t *testing.T) {
	g, err := ParseGID("fe80::5054:ff:fe12:3456")
	if err != nil {
		t.Fatal(err)
	}
	if g.String() != "fe80:0000:0000:0000:5054:00ff:fe12:3456" || g.SubnetPrefix() != 0xfe80<<48 || g.InterfaceID() != 0x505400fffe123456 || g.IsZero() {
		t.Error(g)
	}
	v4, err := ParseGID("10.1.2.3")
	if err != nil || v4.String() != "0000:0000:0000:0000:0000:ffff:0a01:0203" || v4.Addr() != netip.MustParseAddr("10.1.2.3") {
		t.Error(v4, err)
	}
	if back := GIDFromAddr(g.Addr()); back != g {
		t.Error(back)
	}
	for _, s := range []string{"", "x", "fe80::1%eth0", "1.2.3", "fe80::1/64", "10.1.2.3:80"} {
		if _, err := ParseGID(s); !errors.Is(err, errGIDSyntax) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if s := GUID(0x0123456789abcdef).String(); s != "0123:4567:89ab:cdef" {
		t.Error(s)
	}
}

func TestJSON(t *testing.T) {
	type both struct {
		GUID GUID
		GID  GID
	}
	in := both{GUID: 0xfedcba9876543210, GID: GID{10: 0xff, 11: 0xff, 12: 10, 15: 1}}
	b, err := json.Marshal(in)
	if want := `{"GUID":"fedc:ba98:7654:3210","GID":"0000:0000:0000:0000:0000:ffff:0a00:0001"}`; err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
	var out both
	if err := json.Unmarshal(b, &out); err != nil || out != in {
		t.Errorf("%+v, %v", out, err)
	}
	for _, s := range []string{"", "fedc:ba98:7654:321", "fedc:ba98:7654:321g", "fedcba9876543210", "fedc-ba98-7654-3210", "+edc:ba98:7654:3210"} {
		if err := out.GUID.UnmarshalText([]byte(s)); err == nil || out != in {
			t.Errorf("%q is a GUID", s)
		}
	}
	if err := out.GID.UnmarshalText([]byte("x")); err == nil || out != in {
		t.Error("x is a GID")
	}
}

// Whatever is a GID in text is the same GID when it is printed and parsed again.
func FuzzParseGID(f *testing.F) {
	for _, s := range []string{"", "fe80::1", "::ffff:10.0.0.1", "10.0.0.1", "fe80::1%eth0", "0000:0000:0000:0000:0000:ffff:0a01:0203"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		g, err := ParseGID(s)
		if err != nil {
			return
		}
		if again, err := ParseGID(g.String()); err != nil || again != g {
			t.Errorf("%q: %v became %v, %v", s, g, again, err)
		}
	})
}

// Values that the kernel's uapi headers define; a provider passes them on as they are.
func TestKernelValues(t *testing.T) {
	for name, c := range map[string][2]int{
		"IB_QPT_RC": {int(RC), 2}, "IB_QPT_UC": {int(UC), 3}, "IB_QPT_UD": {int(UD), 4},
		"IB_QPS_RESET": {int(Reset), 0}, "IB_QPS_RTS": {int(RTS), 3}, "IB_QPS_ERR": {int(Err), 6},
		"IB_WR_RDMA_WRITE": {int(OpRDMAWrite), 0}, "IB_WR_SEND": {int(OpSend), 2}, "IB_WR_RDMA_READ": {int(OpRDMARead), 4},
		"IB_WR_ATOMIC_FETCH_AND_ADD": {int(OpAtomicFetchAdd), 6}, "IB_WR_LOCAL_INV": {int(OpLocalInv), 7},
		"IB_WR_BIND_MW": {int(OpBindMW), 8}, "IB_WR_SEND_WITH_INV": {int(OpSendWithInv), 9},
		"IB_WR_FLUSH": {int(OpFlush), 14}, "IB_WR_ATOMIC_WRITE": {int(OpAtomicWrite), 15}, "IB_WC_FLUSH": {int(WCFlush), 8}, "IB_WC_ATOMIC_WRITE": {int(WCAtomicWrite), 9},
		"IB_FLUSH_GLOBAL": {int(FlushGlobal), 1}, "IB_FLUSH_PERSISTENT": {int(FlushPersistent), 2}, "IB_FLUSH_RANGE": {int(FlushRange), 0}, "IB_FLUSH_MR": {int(FlushRegion), 1},
		"IB_ACCESS_FLUSH_GLOBAL": {int(AccessFlushGlobal), 0x100}, "IB_ACCESS_FLUSH_PERSISTENT": {int(AccessFlushPersistent), 0x200},
		"IB_SEND_FENCE": {int(SendFence), 1}, "IB_SEND_SIGNALED": {int(SendSignaled), 2}, "IB_SEND_SOLICITED": {int(SendSolicited), 4},
		"IB_WC_WR_FLUSH_ERR": {int(WCFlushErr), 5}, "IB_WC_REM_ACCESS_ERR": {int(WCRemoteAccessErr), 10},
		"IB_WC_RETRY_EXC_ERR": {int(WCRetryExceeded), 12}, "IB_WC_RNR_RETRY_EXC_ERR": {int(WCRNRRetryExceeded), 13}, "IB_WC_GENERAL_ERR": {int(WCGeneralErr), 21},
		"IB_ACCESS_LOCAL_WRITE": {int(AccessLocalWrite), 1}, "IB_ACCESS_REMOTE_ATOMIC": {int(AccessRemoteAtomic), 8},
		"IB_ACCESS_MW_BIND": {int(AccessMWBind), 16}, "IB_ZERO_BASED": {int(AccessZeroBased), 32}, "IB_ACCESS_RELAXED_ORDERING": {int(AccessRelaxedOrdering), 1 << 20},
		"IB_QP_AV": {int(AttrAV), 128}, "IB_QP_MAX_QP_RD_ATOMIC": {int(AttrMaxRdAtomic), 1 << 13}, "IB_QP_MIN_RNR_TIMER": {int(AttrMinRNRTimer), 1 << 15},
		"IB_QP_MAX_DEST_RD_ATOMIC": {int(AttrMaxDestRdAtomic), 1 << 17}, "IB_QP_DEST_QPN": {int(AttrDestQPN), 1 << 20},
		"IB_EVENT_SRQ_LIMIT_REACHED": {int(EventSRQLimit), 15}, "IB_EVENT_GID_CHANGE": {int(EventGIDChange), 18},
		"IB_PORT_ACTIVE": {int(PortActive), 4},
	} {
		if c[0] != c[1] {
			t.Errorf("%s is %d, not %d", name, c[1], c[0])
		}
	}
}

// Words for known values, the number for others, and never a panic.
func TestStrings(t *testing.T) {
	for got, want := range map[string]string{
		RC.String(): "RC", QPType(9).String(): "QPType(9)", SQD.String(): "SQD", QPState(9).String(): "QPState(9)",
		OpRDMAWriteWithImm.String(): "RDMA_WRITE_WITH_IMM", Opcode(99).String(): "Opcode(99)",
		WCRecvRDMAWithImm.String(): "RECV_RDMA_WITH_IMM", WCOpcode(99).String(): "WCOpcode(99)",
		EventGIDChange.String(): "GID change", EventType(99).String(): "EventType(99)",
		PortActive.String(): "ACTIVE", PortState(9).String(): "PortState(9)", LinkMemory.String(): "memory", LinkLayer(99).String(): "unspecified",
		GIDRoCEv2.String(): "RoCE v2", GIDType(99).String(): "GIDType(99)", (CapMW2 | CapUD).String(): "mw2 ud",
		(AttrAV | AttrState | 1<<30).String(): "State, AH, 0x40000000", QPAttrMask(0).String(): "",
		WCStatus(99).Error(): "unknown completion status 99",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for s := range WCStatus(wcStatusCount) {
		if s.Error() == "" || strings.Contains(s.Error(), "unknown") {
			t.Errorf("status %d: %q", uint8(s), s)
		}
	}
	for e := range EventGIDChange + 1 {
		if strings.Contains(e.String(), "(") {
			t.Errorf("event %d has no name", uint8(e))
		}
	}
	if !(CapMW2 | CapSRQ).Has(CapSRQ) || CapMW2.Has(CapSRQ|CapMW2) {
		t.Error("Has")
	}
}

func TestWCOpcodeOf(t *testing.T) {
	for o, want := range map[Opcode]WCOpcode{OpSend: WCSend, OpSendWithImm: WCSend, OpSendWithInv: WCSend, OpRDMAWrite: WCRDMAWrite,
		OpRDMAWriteWithImm: WCRDMAWrite, OpRDMARead: WCRDMARead, OpAtomicCmpSwap: WCCompSwap, OpAtomicFetchAdd: WCFetchAdd, OpBindMW: WCBindMW, OpLocalInv: WCLocalInv,
		OpFlush: WCFlush, OpAtomicWrite: WCAtomicWrite} {
		if got := WCOpcodeOf(o); got != want || got.IsRecv() {
			t.Errorf("%s: %s", o, got)
		}
	}
	if !WCRecv.IsRecv() || !WCRecvRDMAWithImm.IsRecv() {
		t.Error("receives are not told from sends")
	}
}

func TestPayloadLen(t *testing.T) {
	wr := SendWR{SGEs: []SGE{{Length: 1 << 31}, {Length: 1 << 31}, {Length: 5}}}
	if n := wr.PayloadLen(); n != 1<<32+5 {
		t.Error(n)
	}
	wr = SendWR{Inline: make([]byte, 7)}
	if n := wr.PayloadLen(); n != 7 {
		t.Error(n)
	}
}
