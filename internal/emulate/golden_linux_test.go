package emulate

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The trace of stock libmlx5 44.0 doing testdata/golden.script, as `ringside emulate --numbered --trace` writes it for
// testdata/golden.c.
const goldenTrace = "testdata/golden.txt.gz"

// What the two programs may do differently, and does not count, is masked in both traces.
func mask(line string) string {
	f := strings.Fields(line)
	switch {
	case len(f) == 5 && f[1] == "DB":
		// Which UAR page it is: a driver asks for pages as it likes. Behind the request's own bytes, of which the first 64 go to the
		// register, is what was there before.
		words := strings.TrimPrefix(f[3], "first8=") + strings.TrimPrefix(f[4], "bf=")
		return "DB " + f[2][strings.Index(f[2], "+"):] + " " + request(words)
	case len(f) > 5 && f[1] == "WQE":
		return strings.Join(f[1:5], " ") + " " + request(strings.ReplaceAll(strings.Join(f[5:], ""), "|", ""))
	case len(f) > 12 && f[1] == "CQE":
		f[13] = "UIDX" // the number by which a driver finds its queue pair, of its own choice
	}
	return strings.Join(f, " ")
}

// request is a request in hexadecimal, without what lies behind it, and behind inline data up to the next 16 bytes: libmlx5 leaves
// there what was there.
func request(words string) string {
	units := 0
	fmt.Sscanf(words[14:16], "%02x", &units)
	words = words[:min(len(words), 32*(units&0x3f))]
	for at := 32; at+8 <= len(words); at += 32 {
		var n int
		if fmt.Sscanf(words[at:at+8], "%08x", &n); n>>31&1 == 1 && n&0x7fffffff <= 64 {
			end := min(at+8+2*(n&0x7fffffff), len(words))
			return words[:end] + strings.Repeat(".", len(words)-end)
		}
	}
	return words
}

func masked(t *testing.T, r io.Reader) (lines []string) {
	t.Helper()
	s := bufio.NewScanner(r)
	for s.Scan() {
		lines = append(lines, mask(s.Text()))
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return lines
}

func readGolden(t *testing.T) []string {
	t.Helper()
	f, err := os.Open(goldenTrace)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	return masked(t, z)
}

func sameTrace(t *testing.T, got, want []string) {
	t.Helper()
	wrong := 0
	for i := range max(len(got), len(want)) {
		g, w := "nothing", "nothing"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Errorf("line %d:\n got %s\nwant %s", i+1, g, w)
			if wrong++; wrong == 5 {
				t.Fatal("and so on")
			}
		}
	}
}

// This repository's driver writes the bytes that libmlx5 writes, and rings the same registers.
func TestGoldenDriver(t *testing.T) {
	var trace bytes.Buffer
	end(t, start(t, Config{Numbered: true, Trace: &trace, Log: t.Output()}, "golden"), 0)
	want := readGolden(t)
	if len(want) < 1000 {
		t.Fatalf("the golden trace has %d lines", len(want))
	}
	sameTrace(t, masked(t, &trace), want)
}

// The committed trace is libmlx5's.
func TestGoldenLibmlx5(t *testing.T) {
	need(t, "gcc")
	if _, err := os.Stat("/usr/include/infiniband/verbs.h"); err != nil {
		testutil.Skip(t, "libibverbs-dev is not installed")
	}
	program := filepath.Join(t.TempDir(), "golden")
	if out, err := exec.Command("gcc", "-Wall", "-Werror", "-O2", "-o", program, "testdata/golden.c", "-libverbs").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var trace bytes.Buffer
	run(t, Config{Numbered: true, Trace: &trace}, program+" testdata/golden.script")
	if *update {
		f, err := os.Create(goldenTrace)
		if err != nil {
			t.Fatal(err)
		}
		z := gzip.NewWriter(f)
		if _, err := z.Write(trace.Bytes()); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(z.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	sameTrace(t, masked(t, &trace), readGolden(t))
}

const goldenSize = 4096

// golden is golden.c.
func golden([]string) error {
	devices, err := mlx5.Provider().Devices()
	if err != nil {
		return err
	}
	ctx, err := devices[0].Open()
	if err != nil {
		return err
	}
	pd, err := ctx.AllocPD()
	if err != nil {
		return err
	}
	gids, err := ctx.GIDs(1)
	if err != nil {
		return err
	}
	a, b := &side{ctx: ctx, pd: pd, gid: gids[0].GID}, &side{ctx: ctx, pd: pd, gid: gids[0].GID}
	am, bm, err := goldenMemory()
	if err != nil {
		return err
	}
	for i := range am {
		am[i] = byte(i * 7)
	}
	for _, s := range []struct {
		*side
		mem []byte
	}{{a, am}, {b, bm}} {
		if s.mr, err = pd.RegisterMR(driver.MRConfig{Mem: s.mem, FD: -1, Access: ib.AccessLocalWrite | ib.AccessRemote}); err != nil {
			return err
		}
	}
	for _, s := range []*side{a, b} {
		if s.cq, err = ctx.CreateCQ(driver.CQConfig{Entries: 63}); err != nil {
			return err
		}
	}
	for _, s := range []*side{a, b} {
		s.q, err = pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: s.cq, RecvCQ: s.cq,
			Cap: ib.QPCap{MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 2, MaxRecvSGE: 2, MaxInline: 64}})
		if err != nil {
			return err
		}
	}
	if err := errors.Join(a.connect(b), b.connect(a)); err != nil {
		return err
	}
	script, err := os.ReadFile("testdata/golden.script")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(script)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		if err := goldenLine(a, b, am, line); err != nil {
			return fmt.Errorf("%s: %w", strings.TrimSpace(line), err)
		}
	}
	for _, c := range []interface{ Close() error }{a.q, b.q, a.cq, b.cq, a.mr, b.mr, pd, ctx} {
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

func goldenLine(a, b *side, am []byte, line string) error {
	var op string
	var times, n, off, n2, off2, to int
	if k, err := fmt.Sscan(line, &op, &times, &n, &off, &n2, &off2, &to); k != 7 {
		return err
	}
	wr := ib.SendWR{Opcode: ib.OpSend, Flags: ib.SendSignaled, RemoteAddr: goldenB + uint64(to), RKey: b.mr.RKey()}
	if n > 0 {
		wr.SGEs = append(wr.SGEs, ib.SGE{Addr: goldenA + uint64(off), Length: uint32(n), LKey: a.mr.LKey()})
	}
	if n2 > 0 {
		wr.SGEs = append(wr.SGEs, ib.SGE{Addr: goldenA + uint64(off2), Length: uint32(n2), LKey: a.mr.LKey()})
	}
	want := ib.WCSuccess
	switch op {
	case "sendimm", "inlineimm":
		wr.Opcode = ib.OpSendWithImm
	case "write", "inlinewrite", "badkey", "fenced":
		wr.Opcode = ib.OpRDMAWrite
	case "writeimm":
		wr.Opcode = ib.OpRDMAWriteWithImm
	case "read":
		wr.Opcode = ib.OpRDMARead
	case "fetchadd":
		wr.Opcode, wr.CompareAdd = ib.OpAtomicFetchAdd, 5
	case "compareswap":
		wr.Opcode, wr.CompareAdd, wr.Swap = ib.OpAtomicCmpSwap, 5, 9
	}
	switch op {
	case "solicited":
		wr.Flags |= ib.SendSolicited
	case "fenced":
		wr.Flags |= ib.SendFence
	case "badkey":
		wr.RKey, want = 0xdead00, ib.WCRemoteAccessErr
	}
	if strings.Contains(op, "inline") {
		wr.Inline, wr.SGEs = am[off:off+n], nil
	}
	recv := wr.Opcode == ib.OpSend
	if wr.Opcode == ib.OpSendWithImm || wr.Opcode == ib.OpRDMAWriteWithImm {
		wr.Imm, recv = 0xcafe, true
	}
	for range times {
		if recv {
			r := ib.RecvWR{SGEs: []ib.SGE{{Addr: goldenB + 2048, Length: 1024, LKey: b.mr.LKey()}}}
			if _, err := b.q.PostRecv([]ib.RecvWR{r}); err != nil {
				return err
			}
		}
		if _, err := a.q.PostSend([]ib.SendWR{wr}); err != nil {
			return err
		}
		if err := a.wantStatus(0, want); err != nil {
			return err
		}
		if recv {
			if err := b.want(0); err != nil {
				return err
			}
		}
	}
	return nil
}
