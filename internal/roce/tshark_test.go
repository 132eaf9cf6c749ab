package roce_test

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/pcap"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A capture of packets that go both over IPv4 and IPv6.
type capture struct {
	t    *testing.T
	out  bytes.Buffer
	w    *pcap.Writer
	icrc roce.ICRC
}

var ends = [2][2]netip.AddrPort{
	{netip.MustParseAddrPort("10.0.0.1:49152"), netip.MustParseAddrPort("10.0.0.2:4791")},
	{netip.MustParseAddrPort("[fd00::1]:49152"), netip.MustParseAddrPort("[fd00::2]:4791")},
}

func newCapture(t *testing.T) *capture {
	c := &capture{t: t}
	var err error
	if c.w, err = pcap.NewWriter(&c.out, "ringside"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.w.AddInterface(pcap.Interface{Name: "test"}); err != nil {
		t.Fatal(err)
	}
	return c
}

// add adds a packet with a payload, and returns its invariant CRCs.
func (c *capture) add(p *roce.Packet, payload []byte) (sums []string) {
	c.t.Helper()
	b := make([]byte, p.Opcode.HeaderLen()+len(payload)+roce.Pad(len(payload)))
	copy(b[p.PutHeader(b, len(payload)):], payload)
	for _, e := range ends {
		c.icrc.Init(e[0], e[1])
		udp := c.icrc.Put(bytes.Clone(b))
		if err := c.w.Packet(&pcap.Packet{Time: time.Unix(1, 0), Data: roce.AppendDatagram(nil, e[0], e[1], 0, udp), Comment: p.Opcode.String()}); err != nil {
			c.t.Fatal(err)
		}
		sums = append(sums, fmt.Sprintf("0x%08x", binary.BigEndian.Uint32(udp[len(b):])))
	}
	return sums
}

func number(t *testing.T, s string) uint64 {
	t.Helper()
	if s == "" {
		return 0
	}
	n, err := strconv.ParseUint(s, 0, 64)
	if err != nil {
		t.Errorf("%q is no number", s)
	}
	return n
}

// Wireshark's dissector finds in every packet what was put there.
func TestTsharkPackets(t *testing.T) {
	c := newCapture(t)
	type row struct {
		p    roce.Packet
		n    int
		sums []string
	}
	var rows []row
	for i := range 256 {
		o := roce.Opcode(i)
		if !o.Known() || o.Service() == roce.Probes || o.Op() == roce.Flush || o.Op() == roce.AtomicWrite { // which this dissector does not know
			continue
		}
		p := roce.Packet{Opcode: o, Solicited: i%2 == 0, AckReq: i%3 == 0, PKey: roce.DefaultPKey, DestQP: 0x100000 + uint32(i), PSN: ib.PSN(0x200000 + i),
			QKey: 0x01020304, SrcQP: 0x300000 + uint32(i), Addr: 0x1112131415161718, RKey: 0x21222324, Len: 0x31323334, Syndrome: roce.Ack, MSN: 0x414243, Imm: 0x51525354, InvKey: 0x61626364}
		n := 0
		if o.HasPayload() {
			if n = 256; o.Last() {
				n = 50 + i%4
			}
		}
		rows = append(rows, row{p, n, c.add(&p, make([]byte, n))})
	}
	packets := testutil.Tshark(t, c.out.Bytes(), packetFields...)
	if len(packets) != 2*len(rows) {
		t.Fatalf("%d packets, want %d", len(packets), 2*len(rows))
	}
	for i, got := range packets {
		r := &rows[i/2]
		dissected(t, &r.p, r.n, r.sums[i%2], got)
	}
}

// packetFields are what dissected compares.
var packetFields = []string{"infiniband.invariant.crc", "infiniband.bth.opcode", "infiniband.bth.se", "infiniband.bth.padcnt",
	"infiniband.bth.p_key", "infiniband.bth.destqp", "infiniband.bth.a", "infiniband.bth.psn", "infiniband.reth.va", "infiniband.reth.r_key",
	"infiniband.reth.dmalen", "infiniband.aeth.msn", "infiniband.deth.q_key", "infiniband.deth.srcqp", "infiniband.immdt", "infiniband.ieth"}

// dissected compares what tshark has found in a packet with a payload of n bytes and this invariant CRC.
func dissected(t *testing.T, p *roce.Packet, n int, icrc string, got []string) {
	t.Helper()
	o := p.Opcode
	has := func(b bool, v uint64) uint64 {
		if b {
			return v
		}
		return 0
	}
	ud, aeth := o.Service() == roce.UD, o.IsResponse() && o.Op() != roce.ReadResponseMiddle
	bit := func(b bool) uint64 { return has(b, 1) }
	want := []uint64{uint64(o), bit(p.Solicited), uint64(roce.Pad(n)), roce.DefaultPKey, uint64(p.DestQP), bit(p.AckReq), uint64(p.PSN),
		has(o.HasRETH() || isAtomic(o), p.Addr), has(o.HasRETH() || isAtomic(o), uint64(p.RKey)), has(o.HasRETH(), uint64(p.Len)), has(aeth, uint64(p.MSN)), has(ud, uint64(p.QKey)),
		has(ud, uint64(p.SrcQP)), has(o.HasImm(), uint64(p.Imm)), has(o.HasInv(), uint64(p.InvKey))}
	if got[0] != icrc && o != roce.CNP { // of which this dissector does not show it
		t.Errorf("%v: ICRC %s, want %s", o, got[0], icrc)
	}
	for k, w := range want {
		name, v := packetFields[1+k], got[1+k]
		v = strings.NewReplacer("True", "1", "False", "0").Replace(v)
		if name == "infiniband.immdt" || name == "infiniband.ieth" { // bytes, of the header and of its only field
			if v, _, _ = strings.Cut(v, ","); v != "" {
				v = "0x" + v
			}
		}
		if n := number(t, v); n != w {
			t.Errorf("%v: %s is %s, want %#x", o, name, got[1+k], w)
		}
	}
}

var captures = flag.String("captures", "", "files that testutil.Sniffer has written, for TestTsharkRXE")

// Of packets between rxe and the software NIC, as they were on the wire, tshark and this package read the same, and the invariant CRC is the
// one that this package wants with the IPv4 identification that they have.
func TestTsharkRXE(t *testing.T) {
	if *captures == "" {
		t.Skip("no -captures")
	}
	files, err := filepath.Glob(*captures)
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: no such files, %v", *captures, err)
	}
	const fileHeader, packetHeader = 24, 16
	var whole []byte
	var packets [][]byte
	var where []string
	for _, name := range files { // tshark takes long to start
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if whole == nil {
			whole = b[:fileHeader:fileHeader]
		}
		whole = append(whole, b[fileHeader:]...)
		for i, b := 0, b[fileHeader:]; len(b) > 0; i++ {
			n := int(binary.NativeEndian.Uint32(b[8:]))
			packets, where = append(packets, b[packetHeader:][:n]), append(where, fmt.Sprintf("%s, packet %d", filepath.Base(name), i))
			b = b[packetHeader+n:]
		}
	}
	// rxe has no UDP checksum over IPv6 either.
	all := testutil.TsharkWith(t, []string{"udp.ignore_ipv6_zero_checksum:TRUE"}, whole, packetFields...)
	if len(all) != len(packets) {
		t.Fatalf("tshark sees %d packets of %d", len(all), len(packets))
	}
	for i, ip := range packets {
		src, dst, id, udp := roce.Addresses(ip)
		var c roce.ICRC
		c.Init(src, dst)
		if got, ok := c.ID(udp); !ok || got != id {
			t.Errorf("%s: the ICRC is for the identification %#x, %v, not for %#x: % x", where[i], got, ok, id, ip)
		}
		var p roce.Packet
		crc := len(udp) - roce.ICRCLen
		if err := p.Decode(udp[:crc]); err != nil {
			t.Errorf("%s: %v: % x", where[i], err, ip)
			continue
		}
		dissected(t, &p, len(p.Payload), fmt.Sprintf("0x%08x", binary.BigEndian.Uint32(udp[crc:])), all[i])
	}
	t.Logf("%d packets of %d files", len(packets), len(files))
}

func isAtomic(o roce.Opcode) bool {
	return o == roce.Op(roce.RC, roce.CompareSwap) || o == roce.Op(roce.RC, roce.FetchAdd)
}

// So it does in the connection manager's datagrams.
func TestTsharkMADs(t *testing.T) {
	c := newCapture(t)
	req := &roce.REQ{LocalID: 0x01020304, ServiceID: roce.PortSpaceTCP.ServiceID(0x1234), QPN: 0x313233, StartingPSN: 0x414243, MTU: ib.MTU1024, RetryCount: 7, RNRRetryCount: 6,
		PKey: roce.DefaultPKey, ResponderResources: 4, InitiatorDepth: 5, LocalAckTimeout: 18, LocalGID: ib.GID{0xfd, 15: 1}, RemoteGID: ib.GID{0xfd, 15: 2}}
	(&roce.IPHello{Src: ends[0][0], Dst: ends[0][1]}).Put(req.Private[:])
	messages := []roce.CMMessage{req, &roce.REP{LocalID: 5, RemoteID: 6, QPN: 0x313234, StartingPSN: 0x414244}, &roce.RTU{LocalID: 7, RemoteID: 8},
		&roce.DREQ{LocalID: 9, RemoteID: 10, RemoteQPN: 0x313235}, &roce.DREP{LocalID: 11, RemoteID: 12}, &roce.REJ{LocalID: 13, RemoteID: 14, Reason: roce.RejectConsumer}}
	for i, m := range messages {
		var b [roce.MADLen]byte
		roce.PutMAD(b[:], 0x1000+uint64(i), m)
		c.add(&roce.Packet{Opcode: roce.Op(roce.UD, roce.SendOnly), PKey: roce.DefaultPKey, DestQP: roce.GSIQP, SrcQP: roce.GSIQP, QKey: roce.GSIQKey}, b[:])
	}
	packets := testutil.Tshark(t, c.out.Bytes(), "infiniband.mad.transactionid", "infiniband.mad.attributeid", "infiniband.cm.req", "infiniband.cm.req.serviceid.dport",
		"infiniband.cm.req.localqpn", "infiniband.cm.req.startpsn", "infiniband.cm.rep.localqpn", "infiniband.cm.rej.reason")
	if len(packets) != 2*len(messages) {
		t.Fatalf("%d packets, want %d", len(packets), 2*len(messages))
	}
	for i, got := range packets {
		m := messages[i/2]
		if tid, id := number(t, got[0]), number(t, got[1]); tid != 0x1000+uint64(i/2) || id != uint64(m.Attr()) {
			t.Errorf("%v: transaction %s, attribute %s", m.Attr(), got[0], got[1])
		}
		switch m.(type) {
		case *roce.REQ:
			if number(t, got[3]) != 0x1234 || number(t, got[4]) != 0x313233 || number(t, got[5]) != 0x414243 {
				t.Errorf("REQ: %q", got)
			}
		case *roce.REP:
			if number(t, got[6]) != 0x313234 {
				t.Errorf("REP: %q", got)
			}
		case *roce.REJ:
			if number(t, got[7]) != uint64(roce.RejectConsumer) {
				t.Errorf("REJ: %q", got)
			}
		}
	}
}
