package softnic

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// BenchmarkBulkUDP moves 1 MiB at a time over UDP, on one thread: the sum of both sides' costs, without waiting. One packet in a
// hundred is lost, or none.
func BenchmarkBulkUDP(b *testing.B) {
	for _, c := range []struct {
		name, faults string
		op           ib.Opcode
	}{
		{"WRITE", "", ib.OpRDMAWrite},
		{"WRITE, loss", "loss=1%", ib.OpRDMAWrite},
		{"READ", "", ib.OpRDMARead},
		{"READ, loss", "loss=1%", ib.OpRDMARead},
	} {
		b.Run(c.name, func(b *testing.B) {
			var ends [2]*end
			for i := range ends {
				n := openNIC(b, true)
				if err := n.SetFaults(c.faults); err != nil {
					b.Fatal(err)
				}
				ends[i] = newEnd(b, n, endConfig{typ: ib.RC})
			}
			x, y := ends[0], ends[1]
			x.bulk(y)
			y.bulk(x)
			const size, depth = 1 << 20, 8
			wr := []ib.SendWR{{Opcode: c.op, Flags: ib.SendSignaled, SGEs: x.sge(0, size), RemoteAddr: addrOf(y.buf), RKey: y.mr.RKey()}}
			var wc [16]ib.WC
			posted, done := 0, 0
			b.SetBytes(size)
			b.ReportAllocs()
			b.ResetTimer()
			began := cpuTime()
			for done < b.N {
				for ; posted < b.N && posted-done < depth; posted++ {
					if _, err := x.q.PostSend(wr); err != nil {
						b.Fatal(err)
					}
				}
				y.cq.Poll(wc[:])
				for _, c := range wc[:x.cq.Poll(wc[:])] {
					if done++; c.Status != ib.WCSuccess {
						b.Fatal(c.Status)
					}
				}
			}
			b.ReportMetric(float64(cpuTime()-began)/float64(b.N)/size, "cpu-ns/byte")
		})
	}
}

// cpuTime is what the process has used so far.
func cpuTime() time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// bulk connects a QP to a peer by UDP as those are that move much: with the path MTU of an Ethernet's, and READs on their way.
func (e *end) bulk(peer *end) {
	e.t.Helper()
	gid, index, _ := e.n.overUDP(e.t)
	_, _, port := peer.n.overUDP(e.t)
	e.init()
	err := e.q.Modify(e.t.Context(), &ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: gid, SGIDIndex: index, UDPPort: port}, PathMTU: ib.MTU1024, DestQPN: peer.q.QPN(),
		MaxDestRdAtomic: 16, MinRNRTimer: 1}, ib.AttrState|ib.AttrAV|ib.AttrPathMTU|ib.AttrDestQPN|ib.AttrRQPSN|ib.AttrMaxDestRdAtomic|ib.AttrMinRNRTimer)
	if err == nil {
		err = e.q.Modify(e.t.Context(), &ib.QPAttr{State: ib.RTS, MaxRdAtomic: 16, AckTimeout: 14, RetryCount: 7, RNRRetry: 7},
			ib.AttrState|ib.AttrMaxRdAtomic|ib.AttrAckTimeout|ib.AttrRetryCount|ib.AttrRNRRetry|ib.AttrSQPSN)
	}
	if err != nil {
		e.t.Fatal(err)
	}
}
