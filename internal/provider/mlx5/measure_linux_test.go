//go:build amd64 || arm64

package mlx5

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var measured = flag.String("measure", "", "what BenchmarkMeasure measures: "+
	"write|inline|read|fetch-add|send|recv loop|post|poll|empty SIZE SGES BATCH COUNT")

// BenchmarkMeasure is what bench/testdata/libmlx5.c is for libmlx5, on a device that `ringside-bench mlx5` has emulated for it: it
// prints the time of a request, or of a poll in vain, in nanoseconds. Both do the same in the same order.
func BenchmarkMeasure(b *testing.B) {
	if *measured == "" {
		b.Skip("without -measure")
	}
	var m measurement
	if _, err := fmt.Sscan(*measured, &m.op, &m.what, &m.size, &m.sges, &m.batch, &m.count); err != nil {
		b.Fatal(err)
	}
	ns, err := m.run()
	if err != nil {
		b.Fatal(err)
	}
	fmt.Printf("\nmeasured %.3f\n", ns)
	os.Exit(0) // with the device and all that is on it
}

const (
	measuredDepth  = 64
	measuredCQEs   = 256
	measuredSize   = 1 << 16 // at most
	measuredAccess = ib.AccessRemoteWrite | ib.AccessRemoteRead | ib.AccessRemoteAtomic
)

type measurement struct {
	op, what   string
	size, sges int
	batch      int // requests that one call posts
	count      int
	recv       bool
	all        bool // each request completes, not only the last one of a batch

	memory []byte // one half is the peer's
	mr     driver.MR
	cq     driver.CQ
	qp     driver.QP
	ring   []byte // the completions
	next   uint32 // of them written, ever
	at     uint16 // blocks of the queue done
	blocks int    // of it that a request takes
	polled int    // completions of a batch

	sends []ib.SendWR
	recvs []ib.RecvWR
	wcs   []ib.WC
}

// operationsMeasured are how requests are posted, and what completions call them.
var operationsMeasured = map[string]struct {
	opcode ib.Opcode
	code   byte
}{
	"write": {ib.OpRDMAWrite, codeWrite}, "inline": {ib.OpRDMAWrite, codeWrite}, "read": {ib.OpRDMARead, codeRead},
	"fetch-add": {ib.OpAtomicFetchAdd, codeFetchAdd}, "send": {ib.OpSend, codeSend}, "recv": {ib.OpSend, codeSend},
}

func (m *measurement) run() (float64, error) {
	o, ok := operationsMeasured[m.op]
	if !ok {
		return 0, fmt.Errorf("there is no operation %q", m.op)
	}
	m.recv = m.op == "recv"
	m.all = m.recv || m.what == "poll"
	if err := m.openQueues(); err != nil {
		return 0, err
	}
	if err := m.prepareCQEs(o.code); err != nil {
		return 0, err
	}
	m.prepareRequests(o.opcode)
	runtime.LockOSThread()
	switch m.what {
	case "loop":
		return m.loop()
	case "empty":
		return m.empty()
	case "post", "poll":
		return m.part()
	}
	return 0, fmt.Errorf("there is no %q", m.what)
}

// openQueues makes a queue pair that is connected to itself, and its memory region.
func (m *measurement) openQueues() error {
	devices, err := Provider().Devices()
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
	reg, err := mem.Alloc(2*measuredSize, mem.Options{})
	if err != nil {
		return err
	}
	m.memory = reg.Bytes()
	if m.mr, err = pd.RegisterMR(driver.MRConfig{Mem: m.memory, FD: -1, Access: measuredAccess | ib.AccessLocalWrite}); err != nil {
		return err
	}
	if m.cq, err = ctx.CreateCQ(driver.CQConfig{Entries: measuredCQEs - 1}); err != nil {
		return err
	}
	inline := 0
	if m.op == "inline" {
		inline = m.size
	}
	if m.qp, err = pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: m.cq, RecvCQ: m.cq,
		Cap: ib.QPCap{MaxSendWR: measuredDepth, MaxRecvWR: measuredDepth, MaxSendSGE: 4, MaxRecvSGE: 2, MaxInline: inline}}); err != nil {
		return err
	}
	return toItself(ctx, m.qp)
}

// prepareCQEs writes into the completions what stays as it is: all but the counter and the owner bit.
func (m *measurement) prepareCQEs(code byte) error {
	m.ring = m.cq.(*cq).r.mem
	if len(m.ring) != measuredCQEs*cqeBytes {
		return fmt.Errorf("the CQ has %d bytes", len(m.ring))
	}
	for i := range measuredCQEs {
		e := m.ring[i*cqeBytes:][:cqeBytes]
		be.PutUint32(e[56:], uint32(code)<<24|uint32(m.qp.QPN()))
		be.PutUint32(e[44:], uint32(m.size))
		be.PutUint32(e[32:], m.qp.(*qp).index)
		e[63] = cqeFresh
	}
	return nil
}

// prepareRequests makes those of a batch. Their elements are equal pieces of size bytes.
func (m *measurement) prepareRequests(op ib.Opcode) {
	at := uverbs.AddrOf(m.memory)
	m.sends, m.recvs, m.wcs = make([]ib.SendWR, m.batch), make([]ib.RecvWR, m.batch), make([]ib.WC, m.batch)
	for i := range m.batch {
		sges := make([]ib.SGE, m.sges)
		for k := range sges {
			piece := m.size / m.sges
			sges[k] = ib.SGE{Addr: at + uint64(piece*k), Length: uint32(piece), LKey: m.mr.LKey()}
		}
		w := &m.sends[i]
		*w = ib.SendWR{ID: uint64(i), Opcode: op, SGEs: sges}
		if m.op == "inline" {
			w.SGEs, w.Inline = nil, m.memory[:m.size]
		}
		if op != ib.OpSend {
			w.RemoteAddr, w.RKey = at+measuredSize, m.mr.RKey()
		}
		if op == ib.OpAtomicFetchAdd {
			w.CompareAdd = 1
		}
		if m.all || i == m.batch-1 {
			w.Flags = ib.SendSignaled
		}
		m.recvs[i] = ib.RecvWR{ID: uint64(i), SGEs: sges}
	}
	m.blocks, m.polled = 1, 1
	if m.all {
		m.polled = m.batch
	}
	if !m.recv {
		n := ctrlBytes + dataBytes*m.sges
		if m.op == "inline" {
			n = ctrlBytes + units(4+m.size)*unitBytes
		}
		switch op {
		case ib.OpSend:
		case ib.OpAtomicFetchAdd:
			n += 2 * raddrBytes
		default:
			n += raddrBytes
		}
		m.blocks = (n + blockBytes - 1) / blockBytes
	}
}

func (m *measurement) post() (err error) {
	var n int
	if m.recv {
		n, err = m.qp.PostRecv(m.recvs)
	} else {
		n, err = m.qp.PostSend(m.sends)
	}
	if n != m.batch {
		return fmt.Errorf("%d of %d posted: %w", n, m.batch, err)
	}
	return nil
}

// complete is the device: it writes the completions of a batch.
func (m *measurement) complete() {
	step, kind := m.batch*m.blocks, uint32(0)
	if m.all {
		step = m.blocks
	}
	if m.recv {
		kind = 0x20
	}
	for range m.polled {
		m.at += uint16(step)
		// As one word, as it comes from a device: narrower stores would hold up the poller's load.
		be.PutUint32(m.ring[cqeBytes*(m.next&(measuredCQEs-1))+60:], uint32(m.at-uint16(m.blocks))<<16|kind|m.next/measuredCQEs&1)
		m.next++
	}
}

func (m *measurement) poll() error {
	wcs := m.wcs[:m.polled]
	if n := m.cq.Poll(wcs); n != len(wcs) || wcs[0].Status != ib.WCSuccess || wcs[n-1].ID != uint64(m.batch-1) {
		return fmt.Errorf("%d completions, %+v, %v", n, wcs[0], m.cq.Err())
	}
	return nil
}

// loop measures all of it together, in the thread's processor time, to which others on the machine do little.
func (m *measurement) loop() (float64, error) {
	from := threadTime()
	for i := 0; i < m.count; i += m.batch {
		if err := m.post(); err != nil {
			return 0, err
		}
		m.complete()
		if err := m.poll(); err != nil {
			return 0, err
		}
	}
	return float64(threadTime()-from) / float64(m.count), nil
}

func (m *measurement) empty() (float64, error) {
	from := threadTime()
	for range m.count {
		if m.cq.Poll(m.wcs) != 0 {
			return 0, errors.New("a completion")
		}
	}
	return float64(threadTime()-from) / float64(m.count), nil
}

// part measures posting alone, or polling alone: a queue is filled, completed and emptied in turns, which takes so little that a clock
// without a system call is needed. That is one of the time that passes, so what counts is the turn in the middle, which nothing has
// interrupted. What the clock takes is measured likewise, and taken off.
func (m *measurement) part() (float64, error) {
	turns := m.count / measuredDepth
	if turns == 0 || measuredDepth%m.batch != 0 {
		return 0, fmt.Errorf("%d requests in batches of %d do not fill a queue of %d", m.count, m.batch, measuredDepth)
	}
	took, idle := make([]time.Duration, turns), make([]time.Duration, turns)
	epoch := time.Now()
	now := func() time.Duration { return time.Since(epoch) } // CLOCK_MONOTONIC
	for i := range turns {
		from, start := now(), now()
		idle[i] = start - from
		for k := 0; k < measuredDepth; k += m.batch {
			if err := m.post(); err != nil {
				return 0, err
			}
		}
		posted := now()
		for k := 0; k < measuredDepth; k += m.batch {
			m.complete()
		}
		completed := now()
		for k := 0; k < measuredDepth; k += m.batch {
			if err := m.poll(); err != nil {
				return 0, err
			}
		}
		if took[i] = now() - completed; m.what == "post" {
			took[i] = posted - start
		}
	}
	slices.Sort(took)
	slices.Sort(idle)
	return float64(took[turns/2]-idle[turns/2]) / measuredDepth, nil
}

func threadTime() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return ts.Nano()
}

// toItself connects a queue pair to itself.
func toItself(ctx driver.Context, q driver.QP) error {
	gids, err := ctx.GIDs(1)
	if err != nil {
		return err
	}
	for _, m := range []struct {
		a    ib.QPAttr
		mask ib.QPAttrMask
	}{
		{ib.QPAttr{State: ib.Init, Port: 1, Access: measuredAccess}, ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrAccess},
		{ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: gids[0].GID, Port: 1, HopLimit: 1}, PathMTU: ib.MTU1024, DestQPN: q.QPN(), MaxDestRdAtomic: 1, MinRNRTimer: 1},
			ib.AttrState | ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN | ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer},
		{ib.QPAttr{State: ib.RTS, MaxRdAtomic: 1, AckTimeout: 14, RetryCount: 7, RNRRetry: 7},
			ib.AttrState | ib.AttrMaxRdAtomic | ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrSQPSN},
	} {
		if err := q.Modify(context.Background(), &m.a, m.mask); err != nil {
			return fmt.Errorf("to %v: %w", m.a.State, err)
		}
	}
	return nil
}
