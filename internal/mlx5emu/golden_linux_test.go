package mlx5emu

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The trace of a client that does what a C program did with libmlx5 (rdma-core 44.0): sends, a write, a read, inline data, immediates,
// then 200 writes. The emulation that recorded it was another one, so where the two differ, one of them is wrong.
func TestTraceIsLibmlx5s(t *testing.T) {
	f, err := os.Open("../provider/mlx5/testdata/libmlx5-44.0.txt.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	want, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	c := connect(t, newDevice(t, Config{Numbered: true, Manual: true, Trace: &got}))
	a, b := mapAt(t, 0x200000000, pageSize), mapAt(t, 0x200010000, pageSize)
	ka, kb := c.reg(a, everything), c.reg(b, everything)
	ca, cb := c.newCQ(128, -1), c.newCQ(128, -1)
	qa := c.newQP(ca, ca, qpOptions{srq: -1, uidx: 0})
	qb := c.newQP(cb, cb, qpOptions{srq: -1, uidx: 1})
	qa.connectTo(qb.qpn)
	qb.connectTo(qa.qpn)
	for range 3 {
		qb.recv(segData(addrOf(b)+1024, 512, uint32(kb.LKey)))
	}
	from := segData(addrOf(a), 16, uint32(ka.LKey))
	do := func(op, flags byte, imm uint32, receives bool, rest ...[]byte) {
		t.Helper()
		qa.send(op, flags, imm, rest...)
		if e := ca.wait(); e.op != cqeRequester || e.send != op {
			t.Fatalf("completion %+v", e)
		}
		if receives {
			if e := cb.wait(); e.n != 16 {
				t.Fatalf("received %+v", e)
			}
		}
	}
	const want64 = ceUpdate
	copy(a, "hello send\x00")
	do(opSend, want64, 0, true, from)
	copy(a, "hello write\x00")
	do(opWrite, want64, 0, false, segRemote(addrOf(b), uint32(kb.RKey)), from)
	copy(b[64:], "from B by read\x00")
	do(opRead, want64, 0, false, segRemote(addrOf(b)+64, uint32(kb.RKey)), from)
	if string(a[:14]) != "from B by read" || string(b[:11]) != "hello write" || string(b[1024:1034]) != "hello send" {
		t.Errorf("A has %q, B %q and %q", a[:16], b[:16], b[1024:1040])
	}
	copy(a, "inline!\x00")
	do(opSendImm, want64, 0xcafe, true, segInline(a[:16]))
	do(opWriteImm, 0x80|want64|ceSolicited, 0xcafe, true, segRemote(addrOf(b), uint32(kb.RKey)), from)
	for range 200 {
		do(opWrite, want64, 0, false, segRemote(addrOf(b), uint32(kb.RKey)), from)
	}
	qa.send(opWrite, want64, 0, segRemote(addrOf(b), 0xdead00), from)
	if e := ca.wait(); e.op != cqeRequesterErr || e.syndrome != syndromes[ib.WCRemoteAccessErr] {
		t.Fatalf("completion of a write with a wrong key: %+v", e)
	}
	g, w := bytes.Split(got.Bytes(), []byte("\n")), bytes.Split(want, []byte("\n"))
	g = slices.DeleteFunc(g, func(l []byte) bool { // what is not in that trace
		return bytes.HasPrefix(l, []byte("EMU SYNDROME")) || bytes.HasPrefix(l, []byte("EMU RECV"))
	})
	for i := range min(len(g), len(w)) {
		if !bytes.Equal(g[i], w[i]) {
			t.Fatalf("line %d of the trace:\n%s\nlibmlx5's:\n%s", i+1, g[i], w[i])
		}
	}
	if len(g) != len(w) {
		t.Fatalf("the trace has %d lines, libmlx5's %d", len(g), len(w))
	}
}
