package softnic

import (
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A datagram that has arrived is there, although its sender goes before it is polled.
func TestDatagramsOutliveTheirSender(t *testing.T) {
	paths(t, func(t *testing.T, a, b *NIC) {
		to := newEnd(t, b, endConfig{typ: ib.UD})
		c, err := Open() // the sender, which goes
		if err != nil {
			t.Fatal(err)
		}
		c.viaDoor = a.viaDoor
		from := makeEnd(t, c, endConfig{typ: ib.UD})
		for _, e := range []*end{to, from} {
			for _, m := range []struct {
				attr ib.QPAttr
				mask ib.QPAttrMask
			}{
				{ib.QPAttr{State: ib.Init, Port: 1, QKey: 5}, ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrQKey},
				{ib.QPAttr{State: ib.RTR}, ib.AttrState},
				{ib.QPAttr{State: ib.RTS}, ib.AttrState | ib.AttrSQPSN},
			} {
				if err := e.q.Modify(t.Context(), &m.attr, m.mask); err != nil {
					t.Fatal(err)
				}
			}
		}
		const n = 3
		for i := range n {
			to.recv(uint64(i), to.sge(i*100, 100))
		}
		ah, err := from.pd.CreateAH(ib.AHAttr{DGID: b.GID(), Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			from.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, AH: ah.Num(), RemoteQPN: to.q.QPN(), RemoteQKey: 5, SGEs: from.sge(0, 8+i)})
			if wc := from.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("%+v", wc)
			}
		}
		if err := ah.Close(); err != nil {
			t.Fatal(err)
		}
		from.close()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for b.hasLink(c.GID()) {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(5 * time.Millisecond) // for the worker, which closes the block if it does
		for i := range n {
			if wc := to.poll(); wc.ID != uint64(i) || wc.Status != ib.WCSuccess || int(wc.ByteLen) != ib.GRHLen+8+i {
				t.Fatalf("receive %d: %+v", i, wc)
			}
		}
		// Then the block goes.
		q := to.q.(*QP)
		for end := time.Now().Add(20 * time.Second); len(*q.ins.Load()) != 0; {
			if time.Now().After(end) {
				t.Fatal("the block of the peer that has gone stays")
			}
			time.Sleep(time.Millisecond)
		}
	})
}

func (n *NIC) hasLink(g ib.GID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.links[g] != nil
}
