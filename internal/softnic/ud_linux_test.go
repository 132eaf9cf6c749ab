package softnic

import (
	"testing"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Who has an address handle may send, and be answered at once: a UD QP that was there before the NIC had anything to do with the address
// receives there by then, however busy the NIC is.
func TestDatagramAnsweredAtOnce(t *testing.T) {
	asker, answerer := newEnd(t, openNIC(t, true), endConfig{typ: ib.UD}), newEnd(t, openNIC(t, true), endConfig{typ: ib.UD})
	gid, _, port := answerer.n.overUDP(t)
	answerer.ready()
	answerer.recv(1, answerer.sge(0, 100))
	asker.ready()
	asker.recv(2, asker.sge(0, 100))

	busy := make(chan struct{})
	t.Cleanup(func() { close(busy) })
	asker.n.later(func() { <-busy })
	ask := func(e, to *end, attr ib.AHAttr) {
		t.Helper()
		ah, err := e.pd.CreateAH(attr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ah.Close() })
		e.send(ib.SendWR{ID: 3, Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah.Num(), RemoteQPN: to.q.QPN(), RemoteQKey: testQKey, SGEs: e.sge(200, 8)})
	}
	ask(asker, answerer, ib.AHAttr{DGID: gid, SGIDIndex: asker.n.gids.indexOf(gid.Addr()), UDPPort: port, Port: 1}) // which opens the port
	asker.want(3, ib.WCSuccess, -1)
	answerer.want(1, ib.WCSuccess, ib.GRHLen+8)
	_, index, port := asker.n.overUDP(t)
	ask(answerer, asker, ib.AHAttr{DGID: gid, SGIDIndex: index, UDPPort: port, Port: 1})
	answerer.want(3, ib.WCSuccess, -1)
	asker.want(2, ib.WCSuccess, ib.GRHLen+8)
}
