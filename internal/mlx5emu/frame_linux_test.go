package mlx5emu

import (
	"slices"
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Headers are found whatever lengths packets claim, and nothing is read that is not there.
func TestParse(t *testing.T) {
	b := make([]byte, minFrame)
	copy(b, udpFrame)
	for name, c := range map[string]struct {
		change func(b []byte) []byte
		want   headers
	}{
		"as it is":            {func(b []byte) []byte { return b }, headers{typ: typeIPv4, ip: 14, protocol: protoUDP, ports: 34, end: 46}},
		"longer than it is":   {func(b []byte) []byte { be.PutUint16(b[16:], 5000); return b }, headers{typ: typeIPv4, ip: 14, protocol: protoUDP, ports: 34, end: 5014}},
		"shorter":             {func(b []byte) []byte { be.PutUint16(b[16:], 1); return b }, headers{typ: typeIPv4, ip: 14, protocol: protoUDP, ports: 34, end: 15}},
		"options to the end":  {func(b []byte) []byte { b[14] = 0x4f; return b }, headers{typ: typeIPv4, ip: 0}},
		"no header of IP":     {func(b []byte) []byte { b[14] = 0x44; return b }, headers{typ: typeIPv4}},
		"another version":     {func(b []byte) []byte { b[14] = 0x65; return b }, headers{typ: typeIPv4}},
		"a later fragment":    {func(b []byte) []byte { b[21] = 1; return b }, headers{typ: typeIPv4, ip: 14, protocol: protoUDP, end: 46}},
		"TCP that is cut":     {func(b []byte) []byte { b[23] = protoTCP; return b[:53] }, headers{typ: typeIPv4, ip: 14, protocol: protoTCP, end: 46}},
		"IPv6 that is cut":    {func(b []byte) []byte { be.PutUint16(b[12:], typeIPv6); b[14] = 0x60; return b[:53] }, headers{typ: typeIPv6}},
		"a tag":               {func(b []byte) []byte { return slices.Insert(b, 12, 0x81, 0, 0x20, 7) }, headers{tagged: true, vlan: 0x2007, typ: typeIPv4, ip: 18, protocol: protoUDP, ports: 38, end: 50}},
		"a tag, and no more":  {func(b []byte) []byte { be.PutUint16(b[12:], typeVLAN); return b[:16] }, headers{typ: typeVLAN}},
		"a header, and no IP": {func(b []byte) []byte { return b[:14] }, headers{typ: typeIPv4}},
	} {
		in := c.change(slices.Clone(b))
		if got := parse(in); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
		f := frame{data: slices.Clone(in)}
		f.fillChecksums(ethL3Checksum | ethL4Checksum)
		f.verify()
	}
}

// Whatever a frame is, its headers, filters and checksums stay within it.
func FuzzFrame(f *testing.F) {
	f.Add(udpFrame)
	f.Add(slices.Insert(slices.Clone(udpFrame), 12, 0x81, 0, 0x20, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < ethHeader {
			return
		}
		x := frame{data: slices.Clone(b)}
		before := parse(x.data)
		x.fillChecksums(ethL3Checksum | ethL4Checksum)
		if after := parse(x.data); after != before || len(x.data) != len(b) {
			t.Fatalf("%+v, with checksums %+v", before, after)
		}
		if right, kind := x.verify(); before.ip > 0 && !before.v6 && (right&cqeL3Right == 0 || kind != 2<<2) || before.counted(x.data) && right&cqeL4Right == 0 {
			t.Fatalf("%+v: right %#x, kind %#x", before, right, kind)
		}
		for typ, n := range filterSizes {
			any := flow{kind: ib.FlowMatch, filters: []filter{{typ, make([]byte, n), make([]byte, n)}}}
			has := map[uint32]bool{abi.FlowSpecEth: true, abi.FlowSpecIPv4: before.ip > 0 && !before.v6, abi.FlowSpecIPv6: before.v6,
				abi.FlowSpecTCP: before.ports > 0 && before.protocol == protoTCP, abi.FlowSpecUDP: before.ports > 0 && before.protocol == protoUDP}[typ]
			if any.matches(&before, x.data) != has {
				t.Fatalf("%+v: a filter for %#x that looks at nothing", before, typ)
			}
		}
	})
}
