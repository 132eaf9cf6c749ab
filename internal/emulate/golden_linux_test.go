package emulate

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// What golden.c and golden do, and the trace of stock libmlx5 44.0 doing it, as `ringside emulate --numbered --trace` writes it, behind the
// GIDs of the device that was there.
const (
	goldenLists = "testdata/golden.lists"
	goldenTrace = "testdata/golden.txt.gz"
)

var (
	listCount = flag.Int("lists", 200, "how many random lists TestGoldenRandom compares")
	listSeed  = flag.Uint64("list-seed", 0, "their seed; 0: another one each time")
)

// A stream is what happens in a fixed order: the requests of a queue pair, or the completions that it has. How these are between each
// other is the device's affair.
func stream(line string) string {
	f := strings.Fields(line)
	switch {
	case len(f) > 3 && f[1] == "DB":
		return "requests of " + strings.TrimPrefix(f[3], "first8=")[8:14]
	case len(f) > 2 && f[1] == "WQE":
		var n uint32
		fmt.Sscanf(f[2], "qpn=0x%x", &n)
		return fmt.Sprintf("requests of %06x", n)
	case len(f) > 2 && f[1] == "RECV":
		return "receives of " + f[2]
	case len(f) > 2 && f[1] == "CQE":
		return "completions of " + f[len(f)-2][2:]
	case len(f) > 2 && f[1] == "ARM":
		return "arms of " + f[2]
	}
	return ""
}

// What the two programs may do differently, and does not count, is masked in both traces.
func mask(line string, gids gidTable) string {
	f := strings.Fields(line)
	switch {
	case len(f) == 5 && f[1] == "DB":
		// Which UAR page it is: a driver asks for pages as it likes.
		return "DB " + f[2][strings.Index(f[2], "+"):] + " " + request(register(f), gids)
	case len(f) > 5 && f[1] == "WQE":
		return strings.Join(f[1:5], " ") + " " + request(strings.ReplaceAll(strings.Join(f[5:], ""), "|", ""), gids)
	case len(f) > 13 && f[1] == "CQE":
		f[13] = "UIDX" // the number by which a driver finds its queue pair, of its own choice
	}
	return strings.Join(f[1:], " ")
}

// register is what a DB line says.
func register(f []string) string {
	return strings.TrimPrefix(f[3], "first8=") + strings.TrimPrefix(f[4], "bf=")
}

// wide reports whether a DB line is of a register that the request itself was written to, of which at least 64 bytes are known, and not
// its first 8 bytes alone: behind these is what was there before.
func wide(db, wqe []string) bool {
	r, w := register(db), strings.ReplaceAll(strings.Join(wqe[5:], ""), "|", "")
	n := min(len(r), len(w))
	return r[:n] == w[:n]
}

// request is a request in hexadecimal, without what lies behind it, and without the fields below.
func request(words string, gids gidTable) string {
	units := 0
	fmt.Sscanf(words[14:16], "%02x", &units)
	b := []byte(words[:min(len(words), 32*(units&0x3f))])
	drop := func(from, to int) {
		for i := 2 * from; i < min(2*to, len(b)); i++ {
			b[i] = '.'
		}
	}
	switch words[6:8] {
	case "12": // FETCH_ADD: what a COMPARE_SWAP would compare with is left as it was
		drop(40, 48)
	case "25": // UMR: of the key's context only what its mask names is written
		const context = 16 + 48
		drop(context+1, context+2)
		drop(context+3, context+4)
		drop(context+8, context+16)
		drop(context+32, context+64)
		if len(b) > 2*context && b[2*context] == '4' { // the key becomes free: neither rights, address nor length
			drop(context+2, context+3)
			drop(context+16, context+32)
		}
		return string(b)
	case "0a", "0b":
		if len(b) >= 2*64 && string(b[32:40]) == fmt.Sprintf("%08x", goldenQKey) { // a datagram
			gids.name(b)
		}
	}
	words = string(b)
	// Behind inline data, up to the next 16 bytes, is what was there.
	for at := 32; at+8 <= len(words); at += 32 {
		var n int
		if fmt.Sscanf(words[at:at+8], "%08x", &n); n>>31&1 == 1 && n&0x7fffffff <= 1024 {
			end := min(at+8+2*(n&0x7fffffff), len(words))
			return words[:end] + strings.Repeat(".", len(words)-end)
		}
	}
	return words
}

// A gidTable has GIDs in hexadecimal, by index. The first is at random, the others are the host's.
type gidTable map[uint32]string

// tableOf is a device's, as the lines that stand before its trace: those that lists use.
func tableOf(t *testing.T, s *Session) string {
	t.Helper()
	list, err := s.devices[0].GIDs()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range list {
		if e.Index < goldenGIDs {
			fmt.Fprintf(&b, "GID %d %x\n", e.Index, e.GID[:])
		}
	}
	return b.String()
}

// name has names in the place of a datagram's GID and MAC address, if they are the device's own at the index that the request has, and of
// the UDP source port if it may be any, as there is no flow label. What is wrong stays as it is, and so makes a difference.
func (g gidTable) name(request []byte) {
	put := func(from, to int, what, is string) {
		if b := request[2*from : 2*to]; string(b) == is {
			copy(b, strings.Repeat(".", len(b)))
			copy(b, what)
		}
	}
	var global uint32
	fmt.Sscanf(string(request[2*44:2*48]), "%08x", &global)
	gid := g[global>>20&0xff]
	if gid == "" {
		return
	}
	put(48, 64, "GID", gid)
	put(36, 42, "MAC", "02"+gid[2*11:]) // as the device makes it of the GID
	if port := string(request[2*30 : 2*32]); global&0xfffff == 0 && port >= "c000" {
		put(30, 32, "PORT", port)
	}
}

// A trace is its lines by stream, masked.
type trace map[string][]string

func readTrace(t *testing.T, r io.Reader) trace {
	t.Helper()
	tr := trace{}
	s := bufio.NewScanner(r)
	var in string
	rung := map[string][]string{} // the last DB line of a stream, by what it rang for
	at := map[string]int{}        // and where it is
	gids := gidTable{}
	for s.Scan() {
		line := s.Text()
		var index uint32
		var gid string
		if n, _ := fmt.Sscanf(line, "GID %d %s", &index, &gid); n == 2 {
			gids[index] = gid
			continue
		}
		if k := stream(line); k != "" { // else it belongs to the line before
			in = k
		}
		switch f := strings.Fields(line); {
		case len(f) == 5 && f[1] == "DB":
			rung[in], at[in] = f, len(tr[in])
		case len(f) > 5 && f[1] == "WQE" && rung[in] != nil && strings.HasPrefix(register(rung[in]), f[5]):
			if !wide(rung[in], f) {
				tr[in][at[in]] = tr[in][at[in]][:len("DB +0x800 ")+16]
			}
			rung[in] = nil
		}
		tr[in] = append(tr[in], mask(line, gids))
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return tr
}

func (tr trace) lines() (n int) {
	for _, l := range tr {
		n += len(l)
	}
	return n
}

func readGolden(t *testing.T) trace {
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
	return readTrace(t, z)
}

// differences are the first of each stream.
func (tr trace) differences(want trace) (list []difference) {
	names := maps.Clone(want)
	maps.Copy(names, tr)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		g, w := tr[name], want[name]
		for i := range max(len(g), len(w)) {
			d := difference{name, i, "nothing", "nothing"}
			if i < len(g) {
				d.got = g[i]
			}
			if i < len(w) {
				d.want = w[i]
			}
			if d.got != d.want {
				list = append(list, d)
				break
			}
		}
	}
	return list
}

type difference struct {
	stream    string
	line      int
	got, want string
}

// torn reports whether the device may just have looked at a register while the request was being written to it, which on a card comes
// as one write: one of the two has the first bytes only.
func (d difference) torn() bool {
	return strings.HasPrefix(d.got, "DB ") && strings.HasPrefix(d.want, "DB ") && (strings.HasPrefix(d.got, d.want) || strings.HasPrefix(d.want, d.got))
}

// sameTrace compares what two programs do, which is done again if it may have been seen too early.
func sameTrace(t *testing.T, got, want func() trace) (lines int) {
	t.Helper()
	for attempt := 1; ; attempt++ {
		w := want()
		list := got().differences(w)
		if attempt < 4 && len(list) > 0 && !slices.ContainsFunc(list, func(d difference) bool { return !d.torn() }) {
			continue
		}
		for _, d := range list[:min(len(list), 5)] {
			t.Errorf("%s, line %d:\n got %s\nwant %s", d.stream, d.line+1, d.got, d.want)
		}
		return w.lines()
	}
}

// play returns the trace of this repository's driver doing what the file says.
func play(t *testing.T, file string, change ...func(*Config)) trace {
	t.Helper()
	var b bytes.Buffer
	cfg := Config{Numbered: true, Trace: &b, Log: t.Output()}
	for _, f := range change {
		f(&cfg)
	}
	s := start(t, cfg, "golden", file)
	table := tableOf(t, s)
	end(t, s, 0)
	return readTrace(t, io.MultiReader(strings.NewReader(table), &b))
}

// playC returns libmlx5's, as it is, and as it is compared.
func playC(t *testing.T, program, file string, change ...func(*Config)) (raw []byte, tr trace) {
	t.Helper()
	var b bytes.Buffer
	cfg := Config{Numbered: true, Trace: &b}
	for _, f := range change {
		f(&cfg)
	}
	var table string
	runWith(t, cfg, program+" "+file, func(s *Session) { table = tableOf(t, s) })
	raw = append([]byte(table), b.Bytes()...)
	return raw, readTrace(t, bytes.NewReader(raw))
}

// goldenC returns a program that does lists with stock libmlx5.
func goldenC(t *testing.T) string {
	need(t, "gcc")
	if _, err := os.Stat("/usr/include/infiniband/verbs.h"); err != nil {
		testutil.Skip(t, "libibverbs-dev is not installed")
	}
	program := filepath.Join(t.TempDir(), "golden")
	if out, err := exec.Command("gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-o", program, "testdata/golden.c", "-lmlx5", "-libverbs").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// This repository's driver writes the bytes that libmlx5 writes, and rings the same registers.
func TestGoldenDriver(t *testing.T) {
	n := sameTrace(t, func() trace { return play(t, goldenLists) }, func() trace { return readGolden(t) })
	if n < 1000 {
		t.Errorf("the golden trace has %d lines", n)
	}
}

// The committed trace is libmlx5's.
func TestGoldenLibmlx5(t *testing.T) {
	program := goldenC(t)
	if *update {
		raw, _ := playC(t, program, goldenLists)
		f, err := os.Create(goldenTrace)
		if err != nil {
			t.Fatal(err)
		}
		z := gzip.NewWriter(f)
		if _, err := z.Write(raw); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(z.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	sameTrace(t, func() trace { _, tr := playC(t, program, goldenLists); return tr }, func() trace { return readGolden(t) })
}

// The two do the same of random lists, too.
func TestGoldenRandom(t *testing.T) {
	program := goldenC(t)
	const most = 200 // in one run
	lines, left := 0, *listCount
	for ; left > 0 && !t.Failed(); left -= most {
		seed := rand.Uint64() >> 32
		if *listSeed != 0 {
			seed = *listSeed
		}
		file := filepath.Join(t.TempDir(), "random.lists")
		if err := os.WriteFile(file, randomLists(seed, min(left, most)), 0o600); err != nil {
			t.Fatal(err)
		}
		lines += sameTrace(t, func() trace { return play(t, file) }, func() trace { _, tr := playC(t, program, file); return tr })
		if t.Failed() {
			t.Logf("to repeat: -run TestGoldenRandom -lists %d -list-seed %d", min(left, most), seed)
		}
	}
	t.Logf("%d lists, %d lines of trace", *listCount-max(left, 0), lines)
}

// The number of a request counts blocks of 64 bytes, and begins anew after 65,536 of them.
func TestGoldenManyBlocks(t *testing.T) {
	if testing.Short() {
		t.Skip("megabytes of trace")
	}
	program := goldenC(t)
	const inline, blocks = 796, 13 // as many as these, with the segments in front of them
	var b bytes.Buffer
	fmt.Fprintf(&b, "list rc 1 %d 64 1 64 0 0 0\n", inline)
	for n := 0; n < 1<<16+1000; {
		const batch = 50
		for i := range batch {
			fmt.Fprintf(&b, "wr a write %s 4000 r 1 0 %d\n", map[bool]string{false: "i", true: "si"}[i == batch-1], inline)
			n += blocks
		}
		b.WriteString("post\nwait a 1\nwr a write s 4000 r 1 0 16\npost\nwait a 1\n") // of one block, or the end of the ring would always be met alike
		n++
	}
	b.WriteString("end\n")
	file := filepath.Join(t.TempDir(), "many.lists")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	n := sameTrace(t, func() trace { return play(t, file) }, func() trace { _, tr := playC(t, program, file); return tr })
	if n < 1<<16/blocks {
		t.Errorf("the trace has %d lines", n)
	}
}

// So does the number of a receive, of a queue pair's own queue and of a shared one, and what says how many were posted.
func TestGoldenManyReceives(t *testing.T) {
	if testing.Short() {
		t.Skip("megabytes of trace")
	}
	program := goldenC(t)
	queues := []int{0, 1}
	if *listCount <= 200 { // one of them takes long enough
		queues = queues[rand.IntN(2):][:1]
	}
	var b bytes.Buffer
	const most = 1<<16 + 1000
	for _, shared := range queues {
		fmt.Fprintf(&b, "list rc 1 0 64 1 64 %d 0 0\n", shared)
		for n := 0; n < most; {
			const batch = 61 // one that the queue's size is no multiple of
			for i := range batch {
				fmt.Fprintf(&b, "rr b 1 %d %d\n", 4000+n%100, 8+i)
				n++
			}
			b.WriteString("recv b\n")
			for i := range batch {
				fmt.Fprintf(&b, "wr a send %s 0 r 1 0 %d\n", map[bool]string{false: "-", true: "s"}[i == batch-1], 1+i%8)
			}
			fmt.Fprintf(&b, "post\nwait a 1\nwait b %d\n", batch)
		}
		b.WriteString("end\n")
	}
	file := filepath.Join(t.TempDir(), "many.lists")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	n := sameTrace(t, func() trace { return play(t, file) }, func() trace { _, tr := playC(t, program, file); return tr })
	if n < len(queues)*2*most { // a receive and its completion
		t.Errorf("the trace has %d lines", n)
	}
	t.Logf("shared or not: %d", queues)
}

// And on InfiniBand.
func TestGoldenInfiniBand(t *testing.T) {
	program := goldenC(t)
	seed := rand.Uint64() >> 32
	if *listSeed != 0 {
		seed = *listSeed
	}
	file := filepath.Join(t.TempDir(), "random.lists")
	if err := os.WriteFile(file, randomLists(seed, min(*listCount, 50), "rc", "uc", "ud"), 0o600); err != nil {
		t.Fatal(err)
	}
	on := func(cfg *Config) { cfg.InfiniBand = true }
	n := sameTrace(t, func() trace { return play(t, file, on) }, func() trace { _, tr := playC(t, program, file, on); return tr })
	if t.Failed() {
		t.Logf("to repeat: -run TestGoldenInfiniBand -lists %d -list-seed %d", *listCount, seed)
	}
	t.Logf("%d lines of trace", n)
}

// And of frames for devices that want their beginning inline.
func TestGoldenInlineHeaders(t *testing.T) {
	program := goldenC(t)
	seed := rand.Uint64() >> 32
	if *listSeed != 0 {
		seed = *listSeed
	}
	file := filepath.Join(t.TempDir(), "frames.lists")
	if err := os.WriteFile(file, randomLists(seed, min(*listCount, 50), "raw"), 0o600); err != nil {
		t.Fatal(err)
	}
	l2 := func(cfg *Config) { cfg.L2Inline = true }
	n := sameTrace(t, func() trace { return play(t, file, l2) }, func() trace { _, tr := playC(t, program, file, l2); return tr })
	if t.Failed() {
		t.Logf("to repeat: -run TestGoldenInlineHeaders -lists %d -list-seed %d", *listCount, seed)
	}
	t.Logf("%d lines of trace", n)
}
