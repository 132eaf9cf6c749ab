package perf

import (
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"time"
)

// Op is the operation that is measured.
type Op uint8

// The operations. Their numbers travel in the handshake.
const (
	OpSend   Op = 1 // SEND into receives that the server has posted
	OpWrite  Op = 2 // RDMA WRITE
	OpRead   Op = 3 // RDMA READ
	OpAtomic Op = 4 // 8-byte fetch-and-add or compare-and-swap
	OpRPC    Op = 5 // calls of package rpc that echo their argument
)

var opNames = map[Op]string{OpSend: "send", OpWrite: "write", OpRead: "read", OpAtomic: "atomic", OpRPC: "rpc"}

// Ops lists the operations in the order of the command's help.
func Ops() []Op { return []Op{OpSend, OpWrite, OpRead, OpAtomic, OpRPC} }

func (o Op) String() string { return nameOf(opNames, o) }

// MarshalText encodes the name, for JSON.
func (o Op) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// Kind is the question that a test answers.
type Kind uint8

// The kinds. Their numbers travel in the handshake.
const (
	Lat  Kind = 1 // how long one operation takes, one at a time
	BW   Kind = 2 // how many bytes a second go through, with a full queue of large messages
	Rate Kind = 3 // how many messages a second go through, with batches of small ones
)

var kindNames = map[Kind]string{Lat: "lat", BW: "bw", Rate: "rate"}

// Kinds lists the kinds in the order of the command's help.
func Kinds() []Kind { return []Kind{Lat, BW, Rate} }

func (k Kind) String() string { return nameOf(kindNames, k) }

// MarshalText encodes the name, for JSON.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Path is how two software NICs meet. Other devices have one path, and do as they can.
type Path uint8

// Ways to meet.
const (
	PathAuto   Path = 1 // through memory on one host (going by the hosts' names), else by UDP
	PathMemory Path = 2 // through memory
	PathUDP    Path = 3 // by RoCEv2 over UDP, between the addresses that client and server talk to each other from
	PathTCP    Path = 4 // by TCP connections between these
)

var pathNames = map[Path]string{PathAuto: "auto", PathMemory: "memory", PathUDP: "udp", PathTCP: "tcp"}

func (p Path) String() string { return nameOf(pathNames, p) }

// MarshalText makes JSON of a Path its name.
func (p Path) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// ParsePath returns the path called s.
func ParsePath(s string) (Path, error) { return parseName(pathNames, "path", s) }

// PollMode is how a side waits for completions.
type PollMode uint8

// The poll modes. Their numbers travel in the handshake.
const (
	PollBusy     PollMode = 1 // polls without end
	PollAdaptive PollMode = 2 // polls for a while, then sleeps until an event
	PollEvent    PollMode = 3 // sleeps whenever a poll finds nothing
)

var pollNames = map[PollMode]string{PollBusy: "busy", PollAdaptive: "adaptive", PollEvent: "event"}

func (m PollMode) String() string { return nameOf(pollNames, m) }

// MarshalText encodes the name, for JSON.
func (m PollMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// ParsePollMode returns the poll mode called s.
func ParsePollMode(s string) (PollMode, error) { return parseName(pollNames, "poll mode", s) }

// AtomicOp is which atomic operation an atomic test does.
type AtomicOp uint8

// The atomic operations. Their numbers travel in the handshake.
const (
	FetchAdd    AtomicOp = 1
	CompareSwap AtomicOp = 2
)

var atomicNames = map[AtomicOp]string{FetchAdd: "fadd", CompareSwap: "cas"}

func (a AtomicOp) String() string { return nameOf(atomicNames, a) }

// MarshalText encodes the name, for JSON.
func (a AtomicOp) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// ParseAtomicOp returns the atomic operation called s.
func ParseAtomicOp(s string) (AtomicOp, error) { return parseName(atomicNames, "atomic operation", s) }

// Flow is what keeps a stream of SENDs from overrunning the receiver.
type Flow uint8

// The kinds of flow control. Their numbers travel in the handshake.
const (
	// FlowCredit: the server writes how many receives it has posted into the client's memory now and then (RDMA WRITE),
	// and the client never sends more. This is what any real protocol does.
	FlowCredit Flow = 1
	// FlowRNR: the client sends as fast as it can and leaves it to the device's receiver-not-ready retries, as
	// ib_send_bw does.
	FlowRNR Flow = 2
)

var flowNames = map[Flow]string{FlowCredit: "credit", FlowRNR: "rnr"}

func (f Flow) String() string { return nameOf(flowNames, f) }

// MarshalText encodes the name, for JSON.
func (f Flow) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// ParseFlow returns the flow control called s.
func ParseFlow(s string) (Flow, error) { return parseName(flowNames, "flow control", s) }

func nameOf[T ~uint8](names map[T]string, v T) string {
	if s, ok := names[v]; ok {
		return s
	}
	return fmt.Sprintf("unknown(%d)", v)
}

func parseName[T ~uint8](names map[T]string, what, s string) (T, error) {
	var all []string
	for v := range T(len(names)) + 1 {
		n, ok := names[v]
		if !ok {
			continue
		}
		if n == s {
			return v, nil
		}
		all = append(all, n)
	}
	return 0, fmt.Errorf("no %s is called %q: use one of %s", what, s, strings.Join(all, ", "))
}

// Limits of a Spec. They bound what a client can make a server allocate.
const (
	MaxSize        = 1 << 30
	MaxDepth       = 1 << 15
	MaxQPs         = 1024
	MaxBatch       = 1 << 10
	maxInlineWish  = 1 << 16
	maxIters       = 1 << 40
	maxDuration    = 24 * time.Hour
	maxRegion      = 4 << 30 // bytes of registered memory a side
	maxWorkEntries = 1 << 20 // depth x QPs: work requests of a side in flight
)

// autoInlineMax is the longest message that InlineAuto sends inline in latency and rate tests: perftest's default for
// ib_write_lat.
const autoInlineMax = 220

// InlineAuto as Spec.Inline chooses by the test: perftest's default (220 bytes at most) in latency and rate tests, none
// in bandwidth tests.
const InlineAuto = -1

// Spec describes one test with one message size. Both sides follow it; it travels in the handshake.
//
// Zero values are filled in by WithDefaults.
type Spec struct {
	Op   Op
	Kind Kind
	Size int // bytes of payload; always 8 for atomics

	// Warmup is how many operations come before the measurement, or NoWarmup; default 1,000 (rate: 10,000), fewer if the
	// messages are large, and at most Iters.
	Warmup int
	// Iters is how many operations are measured; 0 with a Duration; by default 100,000 (bw: 5,000; rate: 1,000,000), fewer
	// if the messages are large.
	Iters    int64
	Duration time.Duration // how long to measure, instead of Iters

	Inline      int // longest message sent inline, bytes; 0 for none, InlineAuto to let the test choose
	Depth       int // work requests in flight on one QP; default 128 (lat: 64)
	Batch       int // work requests a PostSend, at most Depth; default 1 (rate: 16, or Depth if that is less)
	QPs         int // queue pairs; default 1; latency tests use one
	SignalEvery int // every n-th work request asks for a completion, at most half of Depth; default a quarter of Depth
	InFlight    int // calls in flight (rpc bw and rate); default 64

	Poll   PollMode      // default PollBusy
	Spin   time.Duration // how long PollAdaptive polls before it sleeps; default 20 us (rpc: 50 us, as package transport has it)
	Atomic AtomicOp      // default FetchAdd
	Flow   Flow          // send bw and rate; default FlowCredit
	Path   Path          // default PathAuto
}

// NoWarmup as Spec.Warmup starts the measurement with the first operation.
const NoWarmup = -1

// WithDefaults returns s with its zero fields filled in.
func (s Spec) WithDefaults() Spec {
	pick := func(p *int, lat, bw, rate int) {
		if *p == 0 {
			*p = map[Kind]int{Lat: lat, BW: bw, Rate: rate}[s.Kind]
		}
	}
	if s.Op == OpAtomic {
		pick(&s.Size, 8, 8, 8)
	}
	pick(&s.Size, 8, 65536, 64)
	// Large messages need fewer repetitions, and a sweep over all sizes should end.
	within := func(n int, budget int64) int { return int(min(int64(n), max(100, budget/int64(max(1, s.Size))))) }
	if s.Iters == 0 && s.Duration == 0 {
		n := 0
		pick(&n, 100_000, 5000, 1_000_000)
		s.Iters = int64(within(n, 4<<30))
	}
	if s.Warmup == 0 {
		pick(&s.Warmup, 1000, 1000, 10000)
		s.Warmup = within(s.Warmup, 1<<29)
		if s.Iters > 0 {
			s.Warmup = int(min(int64(s.Warmup), s.Iters))
		}
	}
	pick(&s.Depth, 64, 128, 128)
	pick(&s.Batch, 1, 1, min(16, s.Depth))
	pick(&s.QPs, 1, 1, 1)
	if s.SignalEvery == 0 {
		s.SignalEvery = max(1, s.Depth/4)
	}
	pick(&s.InFlight, 1, 64, 64)
	if s.Poll == 0 {
		s.Poll = PollBusy
	}
	if s.Spin == 0 {
		s.Spin = 20 * time.Microsecond
		if s.Op == OpRPC {
			s.Spin = 50 * time.Microsecond
		}
	}
	if s.Atomic == 0 {
		s.Atomic = FetchAdd
	}
	if s.Flow == 0 {
		s.Flow = FlowCredit
	}
	if s.Path == 0 {
		s.Path = PathAuto
	}
	return s
}

// Validate returns nil for a test that can run, or an error that says what to change. It expects WithDefaults to have
// been applied.
func (s *Spec) Validate() error {
	if _, ok := opNames[s.Op]; !ok {
		return fmt.Errorf("unknown operation %d", s.Op)
	}
	if _, ok := kindNames[s.Kind]; !ok {
		return fmt.Errorf("unknown kind of test %d", s.Kind)
	}
	if _, ok := pollNames[s.Poll]; !ok {
		return fmt.Errorf("unknown poll mode %d", s.Poll)
	}
	if _, ok := atomicNames[s.Atomic]; !ok {
		return fmt.Errorf("unknown atomic operation %d", s.Atomic)
	}
	if _, ok := flowNames[s.Flow]; !ok {
		return fmt.Errorf("unknown flow control %d", s.Flow)
	}
	if _, ok := pathNames[s.Path]; !ok {
		return fmt.Errorf("unknown path %d", s.Path)
	}
	for _, r := range []struct {
		name        string
		v, min, max int64
	}{
		{"size", int64(s.Size), 1, MaxSize},
		{"warmup", int64(s.Warmup), NoWarmup, maxIters},
		{"iters", s.Iters, 0, maxIters},
		{"duration", int64(s.Duration), 0, int64(maxDuration)},
		{"inline", int64(s.Inline), InlineAuto, maxInlineWish},
		{"depth", int64(s.Depth), 1, MaxDepth},
		{"batch", int64(s.Batch), 1, MaxBatch},
		{"qps", int64(s.QPs), 1, MaxQPs},
		{"signal-every", int64(s.SignalEvery), 1, MaxDepth},
		{"inflight", int64(s.InFlight), 1, MaxDepth},
		{"spin", int64(s.Spin), 1, int64(time.Second)},
	} {
		if r.v < r.min || r.v > r.max {
			return fmt.Errorf("%s is %d: want %d to %d", r.name, r.v, r.min, r.max)
		}
	}
	switch {
	case s.Iters > 0 && s.Duration > 0:
		return errors.New("both iters and duration are given: choose one")
	case s.Iters == 0 && s.Duration == 0:
		return errors.New("neither iters nor duration is given")
	case s.Op == OpAtomic && s.Size != 8:
		return fmt.Errorf("atomics work on 8 bytes, not on %d: leave the size out", s.Size)
	case s.Op == OpWrite && s.Kind == Lat && s.Poll != PollBusy:
		return fmt.Errorf("write lat polls memory, so poll mode %v has nothing to sleep on: use busy, or measure send lat", s.Poll)
	case s.Kind == Lat && s.QPs != 1:
		return fmt.Errorf("a latency test uses 1 QP, not %d: measure bw or rate with several", s.QPs)
	case s.Kind == Lat && s.Batch != 1:
		return fmt.Errorf("a latency test posts 1 work request at a time, not %d: measure rate with batches", s.Batch)
	case s.Kind == Lat && s.InFlight != 1:
		return fmt.Errorf("a latency test has 1 call in flight, not %d: measure rpc rate with several", s.InFlight)
	case s.Batch > s.Depth:
		return fmt.Errorf("batch %d is larger than depth %d", s.Batch, s.Depth)
	case s.SignalEvery > max(1, s.Depth/2):
		return fmt.Errorf("signal-every %d is more than half of depth %d: the send queue would fill up before a completion frees it", s.SignalEvery, s.Depth)
	case s.Depth*s.QPs > maxWorkEntries:
		return fmt.Errorf("depth %d x %d QPs is more than %d work requests", s.Depth, s.QPs, maxWorkEntries)
	case s.Op != OpRPC && s.regionSize() > maxRegion:
		return fmt.Errorf("%d QPs with messages of %d bytes need %d bytes of registered memory: the limit is %d", s.QPs, s.Size, s.regionSize(), int64(maxRegion))
	case s.Inline > 0 && (s.Op == OpRead || s.Op == OpAtomic || s.Op == OpRPC):
		return fmt.Errorf("%v cannot be inline: leave inline out", s.Op)
	}
	return nil
}

// cycleBytes is how much memory consecutive messages of one QP walk through before they reuse it: one page, as
// perftest's --cycle_buffer. Larger messages reuse one slot each time.
const cycleBytes = 4096

// slotSize is the distance between consecutive messages in memory: whole cache lines.
func (s *Spec) slotSize() int { return (s.Size + 63) &^ 63 }

// slots is the number of slots of one QP.
func (s *Spec) slots() int {
	// A power of two, so that walking is an AND.
	return 1 << (bits.Len(uint(max(1, cycleBytes/s.slotSize()))) - 1)
}

// qpArea is the number of bytes that one QP sends from, and again that it receives into.
func (s *Spec) qpArea() int { return s.slots() * s.slotSize() }

// regionSize is the length of a side's region: a send area, a receive area and a counter a QP.
func (s *Spec) regionSize() int64 { return 2*int64(s.QPs)*int64(s.qpArea()) + int64(s.QPs)*wordSpacing }

// wordSpacing is the distance between the counters of two QPs: two cache lines, since processors fetch pairs of them.
const wordSpacing = 128

// sendOff, recvOff and wordOff are where in a side's region the n-th QP's areas and counter begin. Both sides' regions
// have the same layout.
func (s *Spec) sendOff(n int) int { return n * s.qpArea() }
func (s *Spec) recvOff(n int) int { return (s.QPs + n) * s.qpArea() }
func (s *Spec) wordOff(n int) int { return 2*s.QPs*s.qpArea() + n*wordSpacing }

// inlineWish is the inline capacity to ask a QP for.
func (s *Spec) inlineWish() int {
	if s.Op == OpRead || s.Op == OpAtomic || s.Op == OpRPC {
		return 0
	}
	if s.Inline == InlineAuto {
		if s.Kind == BW || s.Size > autoInlineMax {
			return 0
		}
		return s.Size
	}
	if s.Size > s.Inline {
		return 0
	}
	return s.Size
}

// recvDepth is the number of receives that a side posts on each QP.
func (s *Spec) recvDepth(server bool) int {
	if s.Op != OpSend || s.Kind != Lat && !server {
		return 0
	}
	return max(4, 2*s.Depth)
}

// recvBatch is how many receives are posted again at a time.
func (s *Spec) recvBatch() int { return max(1, min(16, s.Depth/4)) }

// LatencyKind says what a latency number is: HalfRoundTrip or FullOperation.
func (s *Spec) LatencyKind() string {
	switch {
	case s.Op == OpSend || s.Op == OpWrite:
		return HalfRoundTrip
	case s.Op == OpRPC:
		return RoundTrip
	}
	return FullOperation
}

// What a latency number covers, as perftest's tests have it.
const (
	HalfRoundTrip = "half_round_trip" // ping and pong, divided by two (send, write)
	RoundTrip     = "round_trip"      // request and response (rpc)
	FullOperation = "operation"       // posted until completed (read, atomic)
)

// PowersOfTwo returns 2, 4, 8, ... as far as max: the sizes of a sweep, as perftest's --all.
func PowersOfTwo(max int) []int {
	var s []int
	for n := 2; n <= max; n *= 2 {
		s = append(s, n)
	}
	return s
}
