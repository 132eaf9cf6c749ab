package ring

import (
	"runtime"
	"sync/atomic"
	"testing"
)

// BenchmarkPingPong is what the machine takes to move a message from one core to another and back, without any code around
// it: a bare word, and a completion in a ring with 104 bytes in a buffer elsewhere, as the software NIC lays them out. An
// operation is a round trip. It needs two idle cores.
func BenchmarkPingPong(b *testing.B) {
	const depth, stride = 128, 1 << 8 // words between two buffers: other lines, other pages
	type side struct {
		ring [depth * 2]uint64
		_    [8]uint64
		bufs [depth * stride]uint64
	}
	for _, bc := range []struct {
		name  string
		slots int // of the ring that are used
		words int // in the buffer
	}{{"word", 1, 0}, {"message", depth, 13}} {
		b.Run(bc.name, func(b *testing.B) {
			there, back := new(side), new(side)
			send := func(s *side, i int) {
				k := i % bc.slots
				for j := range bc.words {
					s.bufs[k*stride+j] = uint64(i)
				}
				StoreRel64(&s.ring[2*k], uint64(i+1))
			}
			recv := func(s *side, i int) (sum uint64) {
				k := i % bc.slots
				for n := 1; atomic.LoadUint64(&s.ring[2*k]) != uint64(i+1); n++ {
					if n%(1<<16) == 0 {
						runtime.Gosched() // on one core the other side has to run
					}
				}
				for j := range bc.words {
					sum += s.bufs[k*stride+j]
				}
				return sum
			}
			var echoed, got uint64
			done := make(chan struct{})
			n := b.N
			go func() {
				defer close(done)
				for i := range n {
					echoed += recv(there, i)
					send(back, i)
				}
			}()
			b.ResetTimer()
			for i := range n {
				send(there, i)
				got += recv(back, i)
			}
			b.StopTimer()
			<-done
			if got != echoed {
				b.Errorf("%d came back of %d", got, echoed)
			}
		})
	}
}
