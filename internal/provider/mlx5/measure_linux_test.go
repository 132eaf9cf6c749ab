//go:build amd64 || arm64

package mlx5

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/uverbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var measured = flag.String("measure", "", "what BenchmarkMeasure measures: write|inline|send|recv|empty SIZE BATCH COUNT")

// BenchmarkMeasure is what bench/testdata/libmlx5.c is for libmlx5, on a device that `ringside-bench mlx5` has emulated for it: it
// prints the processor time of a request, or of a poll in vain, in nanoseconds.
func BenchmarkMeasure(b *testing.B) {
	if *measured == "" {
		b.Skip("without -measure")
	}
	var m measurement
	if _, err := fmt.Sscan(*measured, &m.op, &m.size, &m.batch, &m.count); err != nil {
		b.Fatal(err)
	}
	ns, err := m.run()
	if err != nil {
		b.Fatal(err)
	}
	fmt.Printf("\nmeasured %.3f\n", ns)
	os.Exit(0) // with the device and all that is on it
}

type measurement struct {
	op                 string
	size, batch, count int
}

func (m *measurement) run() (float64, error) {
	const cqes, depth = 256, 64
	devices, err := Provider().Devices()
	if err != nil {
		return 0, err
	}
	ctx, err := devices[0].Open()
	if err != nil {
		return 0, err
	}
	pd, err := ctx.AllocPD()
	if err != nil {
		return 0, err
	}
	reg, err := mem.Alloc(1<<16, mem.Options{})
	if err != nil {
		return 0, err
	}
	mr, err := pd.RegisterMR(driver.MRConfig{Mem: reg.Bytes(), FD: -1, Access: ib.AccessLocalWrite | ib.AccessRemoteWrite})
	if err != nil {
		return 0, err
	}
	c, err := ctx.CreateCQ(driver.CQConfig{Entries: cqes - 1})
	if err != nil {
		return 0, err
	}
	cq := c.(*cq)
	inline := 0
	if m.op == "inline" {
		inline = m.size
	}
	q, err := pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: c, RecvCQ: c,
		Cap: ib.QPCap{MaxSendWR: depth, MaxRecvWR: depth, MaxSendSGE: 2, MaxRecvSGE: 2, MaxInline: inline}})
	if err != nil {
		return 0, err
	}
	if err := toItself(ctx, q); err != nil {
		return 0, err
	}

	blocks := 1
	code := byte(codeWrite)
	op := ib.OpRDMAWrite
	switch m.op {
	case "inline":
		blocks = (32 + (4+m.size+15)/16*16 + 63) / 64
	case "send":
		op, code = ib.OpSend, codeSend
	}
	ring := cq.r.mem
	if len(ring) != cqes*cqeBytes {
		return 0, fmt.Errorf("the CQ has %d bytes", len(ring))
	}
	for i := range cqes { // all but the counter and the owner bit stays as it is
		e := ring[i*cqeBytes:][:cqeBytes]
		be.PutUint32(e[56:], uint32(code)<<24|uint32(q.QPN()))
		if m.op == "recv" {
			be.PutUint32(e[44:], uint32(m.size))
		}
		be.PutUint32(e[32:], q.(*qp).index)
		e[63] = cqeFresh
	}
	at := uverbs.AddrOf(reg.Bytes())
	wrs, rrs, wcs := make([]ib.SendWR, m.batch), make([]ib.RecvWR, m.batch), make([]ib.WC, m.batch)
	for i := range wrs {
		sges := []ib.SGE{{Addr: at, Length: uint32(m.size), LKey: mr.LKey()}}
		wrs[i] = ib.SendWR{ID: uint64(i), Opcode: op, SGEs: sges}
		if op == ib.OpRDMAWrite {
			wrs[i].RemoteAddr, wrs[i].RKey = at+8192, mr.RKey()
		}
		if m.op == "inline" {
			wrs[i].SGEs, wrs[i].Inline = nil, reg.Bytes()[:m.size]
		}
		rrs[i] = ib.RecvWR{ID: uint64(i), SGEs: sges}
	}
	wrs[m.batch-1].Flags = ib.SendSignaled
	polled, step, last := 1, m.batch*blocks, blocks
	kind := uint32(0)
	if m.op == "recv" { // each receive completes
		polled, step, last, kind = m.batch, 1, 1, 0x20
	}
	var next uint32
	var counter uint16
	runtime.LockOSThread()
	from := threadTime()
	if m.op == "empty" {
		for range m.count {
			if cq.Poll(wcs) != 0 {
				return 0, errors.New("a completion")
			}
		}
		return float64(threadTime()-from) / float64(m.count), nil
	}
	for i := 0; i < m.count; i += m.batch {
		var n int
		if m.op == "recv" {
			n, err = q.PostRecv(rrs)
		} else {
			n, err = q.PostSend(wrs)
		}
		if n != m.batch {
			return 0, err
		}
		for range polled {
			counter += uint16(step)
			// As one word, as it comes from a device: narrower stores would hold up the poller's load.
			be.PutUint32(ring[cqeBytes*(next&(cqes-1))+60:], uint32(counter-uint16(last))<<16|kind|next/cqes&1)
			next++
		}
		if n := c.Poll(wcs[:polled]); n != polled || wcs[0].Status != ib.WCSuccess || wcs[n-1].ID != uint64(m.batch-1) {
			return 0, fmt.Errorf("%d completions, %+v, %v", n, wcs[0], c.Err())
		}
	}
	return float64(threadTime()-from) / float64(m.count), nil
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
		{ib.QPAttr{State: ib.Init, Port: 1, Access: ib.AccessRemoteWrite}, ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrAccess},
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
