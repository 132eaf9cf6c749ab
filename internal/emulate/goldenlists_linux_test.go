package emulate

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
)

// Random lists of operations. The generator knows what each will lead to: how many completions there are, and whether both sides are
// still connected afterwards.

// A lister writes lists.
type lister struct {
	bytes.Buffer
	r *rand.Rand

	typ                                string
	sges, inline, depth, rsges, rdepth int
	srq, sigall, windows               bool
	bound                              [2]bool // a side's window
	fenced                             [2]bool // a side's last request was to bind or free: libmlx5 keeps the next one's fence over a RESET
	armed                              [2]bool // once a list: what is armed twice between two looks of the device leaves one trace
}

// randomLists returns n lists, of these types of queue pairs.
func randomLists(seed uint64, n int, types ...string) []byte {
	if len(types) == 0 {
		types = []string{"rc", "rc", "rc", "uc", "ud", "raw"}
	}
	w := &lister{r: rand.New(rand.NewPCG(seed, 5))}
	for range n {
		w.typ = w.pick(types...)
		w.list()
	}
	return w.Bytes()
}

func (w *lister) chance(percent int) bool  { return w.r.IntN(100) < percent }
func (w *lister) between(a, b int) int     { return a + w.r.IntN(b-a+1) }
func (w *lister) say(f string, arg ...any) { fmt.Fprintf(w, f+"\n", arg...) }
func (w *lister) pick(of ...string) string { return of[w.r.IntN(len(of))] }
func name(side int) string                 { return [2]string{"a", "b"}[side] }

func (w *lister) list() {
	w.sges, w.rsges = w.between(1, 5), w.between(1, 4)
	w.inline = [...]int{0, 12, 28, 44, 60, 100, 188, 300}[w.r.IntN(8)]
	w.depth, w.rdepth = w.between(8, 64), w.between(8, 64)
	w.srq, w.sigall, w.windows = w.typ != "uc" && w.typ != "raw" && w.chance(25), w.chance(20), w.typ == "rc" && w.chance(40)
	w.bound, w.fenced, w.armed = [2]bool{}, [2]bool{}, [2]bool{}
	bit := map[bool]int{true: 1}
	w.say("list %s %d %d %d %d %d %d %d %d", w.typ, w.sges, w.inline, w.depth, w.rsges, w.rdepth, bit[w.srq], bit[w.sigall], bit[w.windows])
	for x := range 2 {
		if w.typ == "ud" && w.chance(70) {
			w.address(x)
		}
	}
	for range w.between(3, 20) {
		x := 0
		if w.chance(30) {
			x = 1
		}
		switch {
		case w.chance(5):
			w.settle()
			w.say("reset")
		case w.chance(5):
			w.say("resize %s %d", name(x), w.between(130, 1000))
		case w.chance(8) && !w.armed[x]:
			w.armed[x] = true
			w.say("arm %s %d", name(x), w.r.IntN(2))
			w.batch(x, w.between(1, 3))
		case w.windows && w.chance(25):
			w.window(x)
		case w.typ == "ud" && w.chance(15):
			w.address(x)
		case w.chance(6):
			w.failure(x)
			w.say("reset")
		default:
			w.batch(x, w.between(1, min(8, w.depth, w.rdepth)))
		}
	}
	w.say("end")
}

// address has a side's datagrams go another way.
func (w *lister) address(side int) {
	gid, label := 0, w.r.IntN(1<<20)
	if w.chance(30) {
		gid = w.r.IntN(goldenGIDs)
	}
	if w.chance(20) {
		label = 0
	}
	w.say("to %s %d %d %d %d %d", name(side), gid, label, w.r.IntN(8), w.r.IntN(256), w.r.IntN(256))
}

// parts splits n bytes of one side's memory into at most most pieces.
func (w *lister) parts(n, most int) string {
	switch w.typ {
	case "ud":
		return w.within(inlineSource, udReceives, n, most)
	case "raw":
		return w.frame(n, most)
	}
	return w.within(inlineSource, goldenSize, n, most)
}

// What inline data is made of: nobody writes to it. Elsewhere it depends on the device's time what is there when a request is posted, as
// a shared queue's receives reach the memory late (docs/emulate.md).
const inlineSource = 512

// Datagrams come in from here on, apart from all else: their GRHs have the devices' GIDs, which are others in each run, and nothing
// inline must be made of these.
const udReceives = 5000

// within is parts within [from, to).
func (w *lister) within(from, to, n, most int) string {
	k := 1
	if n > most {
		k = w.between(1, most)
	}
	if n == 0 && w.chance(50) {
		k = 0
	}
	s := fmt.Sprint(k)
	for i := range k {
		part := n
		if i < k-1 {
			part = w.between(1, n-(k-1-i))
		}
		n -= part
		s += fmt.Sprintf(" %d %d", from+w.r.IntN(to-from-part), part)
	}
	return s
}

// frame is n bytes that begin with the addresses of a frame, which are at the beginning of the memory.
func (w *lister) frame(n, most int) string {
	const addresses = 12
	head := n
	if most > 1 && w.chance(70) {
		head = w.between(addresses, min(n, 40))
	}
	if head == n {
		return fmt.Sprintf("1 0 %d", n)
	}
	rest := strings.SplitN(w.within(inlineSource, udReceives, n-head, most-1), " ", 2)
	var k int
	fmt.Sscan(rest[0], &k)
	return fmt.Sprintf("%d 0 %d %s", k+1, head, rest[1])
}

// size is a length of a message.
func (w *lister) size() int {
	switch most := 3000; {
	case w.typ == "raw":
		return w.between(18, 1500)
	case w.chance(40):
		return w.between(1, 64)
	case w.chance(5):
		return 0
	case w.typ == "ud":
		return w.between(1, 1000)
	default:
		return w.between(1, most)
	}
}

// flags are those of a request that is the last of its call or not, and whether it has a completion.
func (w *lister) flags(last, inline bool) (s string, completes bool) {
	completes = last || w.sigall
	s = "-"
	if last || w.chance(50) {
		s, completes = "s", true
	}
	if w.chance(20) {
		s += "e"
	}
	if w.typ == "rc" && w.chance(10) {
		s += "f"
	}
	if w.typ == "raw" && w.chance(20) {
		s += "c"
	}
	if inline {
		s += "i"
	}
	return s, completes
}

// receives posts receives for messages of these sizes.
func (w *lister) receives(side int, sizes []int) {
	if len(sizes) == 0 {
		return
	}
	for _, n := range sizes {
		// Never nothing: a shared queue's element of no bytes gets the length 0 from libmlx5, which is 2 GiB to the device.
		room := max(n+w.r.IntN(50), 1)
		switch w.typ {
		case "ud":
			w.say("rr %s %s", name(side), w.within(udReceives, goldenSize, 40+room, w.rsges))
		case "raw": // short frames are filled up
			w.say("rr %s %s", name(side), w.within(udReceives, goldenSize, max(room, 60), w.rsges))
		default:
			w.say("rr %s %s", name(side), w.parts(room, w.rsges))
		}
	}
	w.say("recv %s", name(side))
}

// batch posts n requests in one call, and waits for all that they lead to.
func (w *lister) batch(x, n int) {
	var lines []string
	var sizes []int
	done := 0
	for i := range n {
		line, size, receives, completes := w.request(x, i == n-1)
		lines = append(lines, line)
		if receives {
			sizes = append(sizes, size)
		}
		if completes {
			done++
		}
	}
	w.receives(1-x, sizes)
	for _, l := range lines {
		w.say("%s", l)
	}
	w.say("post")
	w.fenced[x] = false
	w.say("wait %s %d", name(x), done)
	if len(sizes) > 0 {
		w.say("wait %s %d", name(1-x), len(sizes))
	}
}

// ops are the operations of the list's queue pairs.
func (w *lister) ops() []string {
	ops := []string{"send", "sendimm"}
	switch w.typ {
	case "raw":
		ops = ops[:1]
	case "rc", "uc":
		ops = append(ops, "write", "write", "writeimm")
	}
	if w.typ == "rc" {
		ops = append(ops, "read", "read", "fetchadd", "cmpswap")
	}
	return ops
}

// request makes a request that succeeds.
func (w *lister) request(x int, last bool) (line string, size int, receives, completes bool) {
	op := w.pick(w.ops()...)
	size = w.size()
	inline := false
	switch op {
	case "fetchadd", "cmpswap":
		flags, completes := w.flags(last, false)
		return fmt.Sprintf("wr %s %s %s %d r 1 %d 8", name(x), op, flags, inlineSource+8*w.r.IntN((goldenSize-inlineSource)/8),
			inlineSource+w.r.IntN(goldenSize-inlineSource-8)), 8, false, completes
	case "read":
	default:
		if w.inline > 0 && w.chance(40) {
			least := 1
			if w.typ == "raw" {
				least = 18
			}
			if w.inline >= least {
				inline, size = true, w.between(least, w.inline)
			}
		}
	}
	flags, completes := w.flags(last, inline)
	from := w.parts(size, w.sges)
	switch {
	case inline && w.typ == "raw":
		from = w.frame(size, 1)
	case inline:
		from = w.within(0, inlineSource, size, 1)
	}
	line = fmt.Sprintf("wr %s %s %s %d r %s", name(x), op, flags, inlineSource+w.r.IntN(goldenSize-inlineSource-size), from)
	return line, size, op == "send" || op == "sendimm" || op == "writeimm", completes
}

// window binds the peer's window, and uses it or frees it.
func (w *lister) window(x int) {
	p := 1 - x
	if !w.bound[p] {
		w.bindOrFree(p, true)
	}
	switch w.r.IntN(4) {
	case 0:
		w.bindOrFree(p, false)
		return
	case 1:
		n := w.size()
		w.receives(p, []int{n})
		w.say("wr %s sendinv s 0 w %s", name(x), w.parts(n, w.sges))
		w.say("post")
		w.say("wait %s 1", name(x))
		w.say("wait %s 1", name(p))
		w.bound[p] = false
	default:
		n := w.between(1, 2000)
		w.say("wr %s %s s %d w %s", name(x), w.pick("write", "read"), w.between(1100, 1999), w.parts(n, w.sges))
		w.say("post")
		w.say("wait %s 1", name(x))
	}
	w.fenced[x] = false
}

// bindOrFree has a side bind its window, or free it.
func (w *lister) bindOrFree(p int, bind bool) {
	if bind {
		w.say("wr %s bind s 0 r 1 %d %d", name(p), inlineSource+w.r.IntN(500), w.between(4000, 7000))
	} else {
		w.say("wr %s inv s 0 r 0", name(p))
	}
	w.say("post")
	w.say("wait %s 1", name(p))
	w.bound[p], w.fenced[p] = bind, true
}

// settle makes both sides ready for a RESET.
func (w *lister) settle() {
	for p := range w.bound {
		if w.bound[p] {
			w.bindOrFree(p, false)
		}
		if w.fenced[p] {
			w.batch(p, 1)
		}
	}
}

// failure posts requests of which one fails, and those behind it are flushed. Both sides have to be connected anew.
func (w *lister) failure(x int) {
	w.settle()
	behind := w.r.IntN(3)
	received := 0
	n := w.between(19, 500) // of a frame, the first 18 may have to be inline: without more there is no local key that could be wrong
	var line string
	kinds := 1
	if w.typ == "rc" {
		kinds = 7
	}
	switch w.r.IntN(kinds) {
	case 0: // a wrong local key
		op, from := w.pick(w.ops()...), w.parts(n, w.sges)
		if op == "fetchadd" || op == "cmpswap" {
			from = fmt.Sprintf("1 %d 8", inlineSource)
		}
		line = fmt.Sprintf("wr %s %s %s 1000 r %s", name(x), op, w.pick("l", "sl"), from)
	case 1:
		line = fmt.Sprintf("wr %s %s %s %d x %s", name(x), w.pick("write", "read"), w.pick("-", "s"), w.between(1000, 2000), w.parts(n, w.sges))
	case 2: // an atomic with a wrong key, or of a word that is not aligned
		line = fmt.Sprintf("wr %s %s %s %s 1 %d 8", name(x), w.pick("fetchadd", "cmpswap"), w.pick("-", "s"), w.pick("1000 x", "1004 r"), inlineSource)
	case 3: // the receive is too short
		line = fmt.Sprintf("wr %s send %s 0 r %s", name(x), w.pick("-", "s"), w.parts(n+1, w.sges))
		w.say("rr %s 1 %d %d", name(1-x), inlineSource, w.r.IntN(n)+1)
		w.say("recv %s", name(1-x))
		received = 1
	case 4: // the receive has a wrong local key
		line = fmt.Sprintf("wr %s send %s 0 r %s", name(x), w.pick("-", "s"), w.parts(n, w.sges))
		w.say("rl %s 1 %d %d", name(1-x), inlineSource, n)
		w.say("recv %s", name(1-x))
		received = 1
	case 5: // there is no receive
		w.say("reset %d", w.r.IntN(3))
		line = fmt.Sprintf("wr %s %s %s 1000 r %s", name(x), w.pick("send", "sendimm", "writeimm"), w.pick("-", "s"), w.parts(n, w.sges))
	default: // what is to be invalidated is none
		line = fmt.Sprintf("wr %s sendinv %s 0 x %s", name(x), w.pick("-", "s"), w.parts(n, w.sges))
		if !w.srq { // no receive is taken for it: those of a queue pair are flushed, those that are shared are left
			w.receives(1-x, []int{n})
			received = 1
		}
	}
	w.say("%s", line)
	for range behind {
		op := "send"
		if w.typ == "rc" || w.typ == "uc" {
			op = "write"
		}
		w.say("wr %s %s %s %d r 1 0 18", name(x), op, w.pick("-", "s"), inlineSource)
	}
	w.say("post")
	w.say("wait %s %d", name(x), 1+behind)
	if received > 0 {
		w.say("wait %s 1", name(1-x))
	}
}
