package roce

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// at is what a message must have at a place, counted from the end of the management header.
type at struct {
	offset int
	hex    string
}

// Messages with a value in each field, and where the specification wants it.
var goldenCM = map[string]struct {
	message CMMessage
	id      string
	fields  []at
}{
	"REQ": {&REQ{
		LocalID: 0x01020304, VendorID: 0x929394, VendorOptions: 0x95969798, ServiceID: 0x0000000001061234, CAGUID: 0x1112131415161718, QKey: 0x21222324, QPN: 0x313233, ResponderResources: 0x34,
		InitiatorDepth: 0x35, RemoteResponseTimeout: 20, LocalResponseTimeout: 19, Transport: TransportUC, FlowControl: true, StartingPSN: 0x414243,
		RetryCount: 7, RNRRetryCount: 6, PKey: 0xffff, MTU: ib.MTU1024, SRQ: true, MaxCMRetries: 15, LocalLID: 0x5152, RemoteLID: 0x5354,
		LocalGID: ib.GID{0x61, 15: 0x62}, RemoteGID: ib.GID{0x63, 15: 0x64}, FlowLabel: 0x71727, PacketRate: 0x23, TrafficClass: 0x74, HopLimit: 0x40, SL: 5,
		SubnetLocal: true, LocalAckTimeout: 18, Private: [92]byte{0x81, 91: 0x82},
	}, "0010", []at{
		{-4, "95969798"}, {0, "01020304"}, {4, "00929394"}, {8, "0000000001061234"}, {16, "1112131415161718"}, {24, "00000000"}, {28, "21222324"}, {32, "31323334"}, {36, "00000035"},
		{40, "000000" + "a3"}, {44, "414243" + "9f"}, {48, "ffff"}, {50, "36"}, {51, "f8"}, {52, "51525354"}, {56, "61"}, {71, "62"}, {72, "63"}, {87, "64"},
		{88, "71727023"}, {92, "7440"}, {94, "58"}, {95, "90"}, {140, "81"}, {231, "82"},
	}},
	"REP": {&REP{
		LocalID: 0x01020304, RemoteID: 0x05060708, VendorID: 0x929394, VendorOptions: 0x95969798, QKey: 0x21222324, QPN: 0x313233, StartingPSN: 0x414243, ResponderResources: 0x34, InitiatorDepth: 0x35,
		TargetAckDelay: 15, FailoverAccepted: 1, FlowControl: true, RNRRetryCount: 7, SRQ: true, CAGUID: 0x1112131415161718, Private: [196]byte{0x81, 195: 0x82},
	}, "0013", []at{
		{-4, "95969798"}, {0, "0102030405060708"}, {8, "21222324"}, {12, "31323392"}, {16, "00000093"}, {20, "41424394"}, {24, "3435"}, {26, "7b"}, {27, "f0"},
		{28, "1112131415161718"}, {36, "81"}, {231, "82"},
	}},
	"RTU":  {&RTU{LocalID: 1, RemoteID: 2, Private: [224]byte{0x81, 223: 0x82}}, "0014", []at{{0, "0000000100000002"}, {8, "81"}, {231, "82"}}},
	"DREP": {&DREP{LocalID: 1, RemoteID: 2, Private: [224]byte{0x81, 223: 0x82}}, "0016", []at{{0, "0000000100000002"}, {8, "81"}, {231, "82"}}},
	"DREQ": {&DREQ{LocalID: 1, RemoteID: 2, RemoteQPN: 0x313233, Private: [220]byte{0x81, 219: 0x82}}, "0015",
		[]at{{0, "0000000100000002"}, {8, "31323300"}, {12, "81"}, {231, "82"}}},
	"REJ": {&REJ{LocalID: 1, RemoteID: 2, Rejected: 1, Reason: RejectConsumer, InfoLen: 72, Info: [72]byte{0x71, 71: 0x72}, Private: [148]byte{0x81, 147: 0x82}}, "0012",
		[]at{{0, "0000000100000002"}, {8, "40"}, {9, "90"}, {10, "001c"}, {12, "71"}, {83, "72"}, {84, "81"}, {231, "82"}}},
	"MRA": {&MRA{LocalID: 1, RemoteID: 2, Received: 1, ServiceTimeout: 20, Private: [222]byte{0x81, 221: 0x82}}, "0011",
		[]at{{0, "0000000100000002"}, {8, "40a0"}, {10, "81"}, {231, "82"}}},
	"SIDR_REQ": {&SIDRREQ{RequestID: 1, PKey: 0xffff, ServiceID: 0x0000000001111234, Private: [216]byte{0x81, 215: 0x82}}, "0017",
		[]at{{0, "00000001"}, {4, "ffff"}, {8, "0000000001111234"}, {16, "81"}, {231, "82"}}},
	"SIDR_REP": {&SIDRREP{RequestID: 1, Status: 2, InfoLen: 3, QPN: 0x313233, ServiceID: 0x0000000001111234, QKey: 0x21222324, Info: [72]byte{0x71, 71: 0x72},
		Private: [136]byte{0x81, 135: 0x82}}, "0018",
		[]at{{0, "00000001"}, {4, "0203"}, {8, "31323300"}, {12, "0000000001111234"}, {20, "21222324"}, {24, "71"}, {95, "72"}, {96, "81"}, {231, "82"}}},
}

func TestGoldenMADs(t *testing.T) {
	for name, c := range goldenCM {
		var b [MADLen]byte
		PutMAD(b[:], 0x0102030405060708, c.message)
		if want := unhex(t, "01070203"+"00000000"+"0102030405060708"+c.id+"0000"); !bytes.Equal(b[:len(want)], want) {
			t.Errorf("%s: header %x, want %x", name, b[:len(want)], want)
		}
		for _, f := range c.fields {
			want := unhex(t, f.hex)
			if got := b[madHeaderLen+f.offset:][:len(want)]; !bytes.Equal(got, want) {
				t.Errorf("%s: %x at %d, want %x", name, got, f.offset, want)
			}
		}
		tid, m, err := DecodeMAD(b[:])
		if err != nil || tid != 0x0102030405060708 {
			t.Errorf("%s: transaction %#x, %v", name, tid, err)
			continue
		}
		if !reflect.DeepEqual(m, c.message) {
			t.Errorf("%s: decoded %+v, want %+v", name, m, c.message)
		}
		if got := m.Attr().String(); got != name {
			t.Errorf("%s calls itself %s", name, got)
		}
	}
}

func TestDecodeMADRefuses(t *testing.T) {
	var good [MADLen]byte
	PutMAD(good[:], 1, &RTU{})
	for name, change := range map[string]func(b []byte) []byte{
		"255 bytes":                        func(b []byte) []byte { return b[:255] },
		"not the CM":                       func(b []byte) []byte { b[1] = 3; return b },
		"CM version":                       func(b []byte) []byte { b[2] = 1; return b },
		"get":                              func(b []byte) []byte { b[3] = 1; return b },
		"path change, which is not spoken": func(b []byte) []byte { b[17] = 0x19; return b },
	} {
		b := good
		bad := change(b[:])
		if _, m, err := DecodeMAD(bad); err == nil || m != nil || !strings.HasPrefix(err.Error(), "roce: ") {
			t.Errorf("%s: %v, %v", name, m, err)
		}
		if n := testing.AllocsPerRun(10, func() { DecodeMAD(bad) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func TestIPHello(t *testing.T) {
	for name, c := range map[string]struct {
		hello IPHello
		hex   string
	}{
		"IPv4": {IPHello{src4, dst4}, "0040c000" + "0000000000000000000000000a000001" + "0000000000000000000000000a000002"},
		"IPv6": {IPHello{src6, dst6}, "0060c000" + "fd000000000000000000000000000001" + "fd000000000000000000000000000002"},
	} {
		var b [IPHelloLen]byte
		c.hello.Put(b[:])
		if want := unhex(t, c.hex); !bytes.Equal(b[:], want) {
			t.Errorf("%s: %x, want %x", name, b, want)
		}
		var got IPHello
		if err := got.Decode(b[:], PortSpaceTCP.ServiceID(4791)); err != nil || got != c.hello {
			t.Errorf("%s: %v, %v, want %v", name, got, err, c.hello)
		}
		b[1] = 0x50
		if got.Decode(b[:], 0) == nil || got.Decode(b[:35], 0) == nil {
			t.Errorf("%s: accepted a version or a length that there is not", name)
		}
	}
	if id := PortSpaceUDP.ServiceID(0xffff); id != 0x0111ffff {
		t.Errorf("service ID %#x", id)
	}
}

// What is decoded and encoded again is what it was, but for what is not spoken.
func FuzzDecodeMAD(f *testing.F) {
	for _, c := range goldenCM {
		var b [MADLen]byte
		PutMAD(b[:], 7, c.message)
		f.Add(b[:])
		r := rand.New(rand.NewPCG(1, 2))
		for i := madHeaderLen; i < MADLen; i++ {
			b[i] = byte(r.Uint32())
		}
		f.Add(b[:])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		tid, m, err := DecodeMAD(b)
		if err != nil {
			return
		}
		var c [MADLen]byte
		PutMAD(c[:], tid, m)
		tid2, m2, err := DecodeMAD(c[:])
		if err != nil || tid2 != tid || !reflect.DeepEqual(m, m2) {
			t.Fatalf("%+v became %+v (%v)", m, m2, err)
		}
		if q, ok := m.(*REQ); ok {
			var h IPHello
			if h.Decode(q.Private[:], q.ServiceID) == nil {
				h.Put(q.Private[:])
			}
		}
	})
}
