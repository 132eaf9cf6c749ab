//go:build amd64 || arm64

package mlx5

import (
	"runtime"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// benchQP is a queue pair for benchmarks: the benchmark writes completions itself, with done.
func benchQP(b *testing.B) (x *bench, wrs []ib.SendWR, wcs []ib.WC, done func(n int)) {
	x = newBench(b, ib.RC, func(cfg *driver.QPConfig) {
		cfg.Cap = ib.QPCap{MaxSendWR: 64, MaxRecvWR: 64, MaxSendSGE: 2, MaxRecvSGE: 2, MaxInline: 64}
	})
	wrs = make([]ib.SendWR, 16)
	for i := range wrs {
		wrs[i] = ib.SendWR{ID: uint64(i), Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: []ib.SGE{{Addr: 0x200000000, Length: 64, LKey: 0x1842}},
			RemoteAddr: 0x200010000, RKey: 0x1942}
	}
	kc := x.kc
	first := x.kq.cqeOf(0, 0)
	first[56], first[63] = codeWrite, cqeFresh
	for i := range kc.n { // all but the counter and the owner bit stays as it is
		copy(kc.ring[64*i:], first[:])
	}
	at := uint16(0)
	return x, wrs, make([]ib.WC, 16), func(n int) {
		at += uint16(n)
		c := kc.ring[64*(kc.next&(kc.n-1)):][:64]
		// As one word, as it comes from a device: narrower stores would hold up the poller's load.
		be.PutUint32(c[60:], uint32(at-1)<<16|kc.next/kc.n&1)
		kc.next++
	}
}

// cpu makes the benchmark report how much time its thread has had, which on a busy machine is less than what has passed. It is called
// right before the loop, and the result after it.
func cpu(b *testing.B) (stop func()) {
	runtime.LockOSThread()
	start := threadTime()
	return func() {
		b.ReportMetric(float64(threadTime()-start)/float64(b.N), "cpu-ns/op")
		runtime.UnlockOSThread()
	}
}

// A signalled RDMA WRITE of 64 bytes: posted, completed by the benchmark, polled.
func BenchmarkPostPoll(b *testing.B) {
	x, wrs, wcs, done := benchQP(b)
	wrs, wcs = wrs[:1], wcs[:1]
	stop := cpu(b)
	for b.Loop() {
		if n, err := x.qp.PostSend(wrs); n != 1 {
			b.Fatal(err)
		}
		done(1)
		if x.cq.Poll(wcs) != 1 {
			b.Fatal(x.cq.Err())
		}
	}
	stop()
}

// BenchmarkDevice is what the benchmarks do themselves for each completion.
func BenchmarkDevice(b *testing.B) {
	_, _, _, done := benchQP(b)
	stop := cpu(b)
	for b.Loop() {
		done(1)
	}
	stop()
}

// Requests posted in batches of 16, the last of which is signalled. The time is that of a batch.
func BenchmarkPost16(b *testing.B) {
	x, wrs, wcs, done := benchQP(b)
	for i := range wrs[:15] {
		wrs[i].Flags = 0
	}
	stop := cpu(b)
	for b.Loop() {
		if n, err := x.qp.PostSend(wrs); n != len(wrs) {
			b.Fatal(err)
		}
		done(len(wrs))
		if x.cq.Poll(wcs) != 1 {
			b.Fatal(x.cq.Err())
		}
	}
	stop()
}

func BenchmarkPollEmpty(b *testing.B) {
	x, _, wcs, _ := benchQP(b)
	stop := cpu(b)
	for b.Loop() {
		if x.cq.Poll(wcs) != 0 {
			b.Fatal("a completion")
		}
	}
	stop()
}
