//go:build amd64 || arm64

package mlx5

import (
	"bufio"
	"compress/gzip"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A golden is one request as libmlx5 wrote it.
type golden struct {
	half       int    // of the register
	register   []byte // 64 bytes
	wqe        []byte
	idx, dbr   int
	recv, done []byte // completions
}

// goldens reads testdata/README.md's file.
func goldens(t *testing.T) (list []golden) {
	f, err := os.Open("testdata/libmlx5-44.0.txt.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		s = strings.ReplaceAll(s, "TIMESTAMP", strings.Repeat("0", 16))
		b, err := hex.DecodeString(strings.NewReplacer(" ", "", "|", "").Replace(s))
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		return b
	}
	for s := bufio.NewScanner(z); s.Scan(); {
		var uar, reg, idx, dbr, pi int
		var first, rest string
		line := s.Text()
		last := len(list) - 1
		switch {
		case strings.HasPrefix(line, "EMU DB"):
			if _, err := fmt.Sscanf(line, "EMU DB uar=%d+0x%x first8=%s bf=%s", &uar, &reg, &first, &rest); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			list = append(list, golden{half: (reg - 0x800) / 256, register: unhex(first + rest)})
		case strings.HasPrefix(line, "EMU WQE"):
			if _, err := fmt.Sscanf(line, "EMU WQE qpn=0x100 idx=%d dbr=%d", &idx, &dbr); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			list[last].idx, list[last].dbr = idx, dbr
			list[last].wqe = unhex(strings.SplitN(line, " ", 6)[5])
		case strings.HasPrefix(line, "EMU CQE"):
			if _, err := fmt.Sscanf(line, "EMU CQE pi=%d", &pi); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			c := unhex(strings.SplitN(line, " ", 4)[3])
			if c[59] == 1 { // queue pair 0x101
				list[last].recv = c
			} else {
				list[last].done = c
			}
		default:
			t.Fatalf("%q", line)
		}
	}
	return list
}

// The requests of the golden file, written by this package: the same bytes in the send queue, at the register and in the doorbell
// record; and its completions mean to this package what they meant.
func TestGolden(t *testing.T) {
	list := goldens(t)
	if len(list) != 206 {
		t.Fatalf("%d requests", len(list))
	}
	b := bare(t)
	cap := func(cfg *driver.QPConfig) {
		cfg.Cap = ib.QPCap{MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 2, MaxRecvSGE: 2, MaxInline: 64}
	}
	b.with(ib.RC, cap)
	other := b.newQP(ib.RC, cap)
	defer b.close(other)
	const addrA, addrB, lkey, rkey = 0x200000000, 0x200010000, 0x1842, 0x1942
	for i := range 3 {
		r := ib.RecvWR{ID: uint64(0xbee1 + i), SGEs: []ib.SGE{{Addr: addrB + 1024, Length: 512, LKey: 0x1942}}}
		if n, err := other.PostRecv([]ib.RecvWR{r}); n != 1 {
			t.Fatal(err)
		}
	}
	data := []ib.SGE{{Addr: addrA, Length: 16, LKey: lkey}}
	script := []ib.SendWR{
		{ID: 1, Opcode: ib.OpSend, SGEs: data},
		{ID: 2, Opcode: ib.OpRDMAWrite, SGEs: data, RemoteAddr: addrB, RKey: rkey},
		{ID: 3, Opcode: ib.OpRDMARead, SGEs: data, RemoteAddr: addrB + 64, RKey: rkey},
		{ID: 4, Opcode: ib.OpSendWithImm, Imm: 0xcafe, Inline: []byte("inline!\x00y read\x00\x00")},
		{ID: 5, Opcode: ib.OpRDMAWriteWithImm, Imm: 0xcafe, SGEs: data, RemoteAddr: addrB, RKey: rkey, Flags: ib.SendSolicited | ib.SendFence},
	}
	for i := range 200 {
		script = append(script, ib.SendWR{ID: uint64(100 + i), Opcode: ib.OpRDMAWrite, SGEs: data, RemoteAddr: addrB, RKey: rkey})
	}
	script = append(script, ib.SendWR{ID: 6, Opcode: ib.OpRDMAWrite, SGEs: data, RemoteAddr: addrB, RKey: 0xdead00})
	for i := range script {
		g, wr := &list[i], script[i]
		wr.Flags |= ib.SendSignaled
		b.post(wr)
		what := fmt.Sprintf("request %d", i)
		at := g.idx % (len(b.kq.sq) / 64) * 64
		sameBytes(t, what+" in the queue", b.kq.sq[at:][:len(g.wqe)], g.wqe)
		sameBytes(t, what+" at the register", b.k.register(b.qp.reg.page, 0, g.half)[:64], g.register)
		if got := be.Uint32(b.kq.record[4:]); got != uint32(g.dbr) {
			t.Errorf("%s: doorbell record %d, want %d", what, got, g.dbr)
		}
		var want []ib.WC
		if g.recv != nil {
			b.feed(g.recv, b.k.qps[other.Handle])
			w := ib.WC{ID: 0xbee1 + uint64(be.Uint16(g.recv[60:])), Opcode: ib.WCRecv, ByteLen: 16, QPN: 0x101}
			switch wr.Opcode {
			case ib.OpSendWithImm:
				w.Flags, w.Imm = ib.WCWithImm, 0xcafe
			case ib.OpRDMAWriteWithImm:
				w.Opcode, w.Flags, w.Imm = ib.WCRecvRDMAWithImm, ib.WCWithImm, 0xcafe
			}
			want = append(want, w)
		}
		w := ib.WC{ID: wr.ID, Opcode: ib.WCOpcodeOf(wr.Opcode), QPN: 0x100}
		switch {
		case wr.ID == 6:
			g.done[55], g.done[54] = 0x13, 0x88
			w.Status, w.VendorErr = ib.WCRemoteAccessErr, 0x88
		case wr.Opcode == ib.OpRDMARead:
			w.ByteLen = 16
		}
		b.feed(g.done, b.kq)
		want = append(want, w)
		for j, got := range b.poll(len(want)) {
			if got != want[j] {
				t.Errorf("%s: completion %+v, want %+v", what, got, want[j])
			}
		}
		if t.Failed() {
			return
		}
	}
}

// feed writes a golden completion, with the index that this package has given to the queue pair.
func (b *bench) feed(c []byte, q *fakeQP) {
	e := [64]byte(c)
	be.PutUint32(e[32:], q.index)
	b.kc.add(e)
}

func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%s: byte %d is %#x, want %#x\n got %x\nwant %x", what, i, got[i], want[i], got[:len(want)], want)
			return
		}
	}
}
