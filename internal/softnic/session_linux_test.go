package softnic

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// counting counts what a session tells.
type counting struct{ packets, finished int }

func (c *counting) Packet(*observe.Seen) error                  { c.packets++; return nil }
func (c *counting) Flush() error                                { return nil }
func (c *counting) Finish(s *observe.Source, lost uint64) error { c.finished++; return nil }

// A session that has packets enough lets go of all NICs, also of one that has ended meanwhile, and tells of each that it is over.
func TestEnoughOfEndedNIC(t *testing.T) {
	testutil.CheckLeaks(t)
	na, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if na.sharedE != nil {
		na.Close()
		testutil.Skip(t, na.sharedE.Error())
	}
	a, b := makeEnd(t, na, endConfig{typ: ib.RC}), makeEnd(t, na, endConfig{typ: ib.RC})
	a.connect(b)
	b.connect(a)
	s, err := observe.Attach(t.Context(), na.gid, observe.MaxData, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		a.send(ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: a.sge(0, 8), RemoteAddr: addrOf(b.buf), RKey: b.mr.RKey(), Flags: ib.SendSignaled})
		a.poll()
	}
	a.close()
	b.close()
	na.Close()
	testutil.Eventually(t, "the end of the NIC", s.Ended)
	calls := make(chan *observe.Source, 1)
	calls <- s
	close(calls)
	var sink counting
	session := observe.Session{Count: 1, Calls: calls, Sink: &sink, Warn: func(err error) { t.Error(err) }}
	if err := session.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if sink.packets != 1 || sink.finished != 1 {
		t.Errorf("%+v", sink)
	}
}
