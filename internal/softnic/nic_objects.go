package softnic

import (
	"fmt"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The objects of a NIC, by their numbers.

func (n *NIC) addQP(q *QP) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return driver.ErrClosed
	}
	if len(n.qps) >= maxQPs {
		return fmt.Errorf("the software NIC has %d queue pairs at most", maxQPs)
	}
	for n.qps[n.nextQPN] != nil || n.nextQPN < 2 {
		n.nextQPN = (n.nextQPN + 1) & ib.MaxQPN
	}
	q.qpn = n.nextQPN
	n.nextQPN = (n.nextQPN + 1) & ib.MaxQPN
	n.qps[q.qpn] = q
	n.qpList.Store(nil)
	return nil
}

func (n *NIC) dropQP(q *QP) {
	n.mu.Lock()
	if n.qps[q.qpn] == q {
		delete(n.qps, q.qpn)
		n.qpList.Store(nil)
	}
	n.mu.Unlock()
}

func (n *NIC) qp(k ib.QPN) *QP {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.qps[k]
}

// eachQP calls f for every QP, with no lock held.
func (n *NIC) eachQP(f func(*QP)) {
	list := n.qpList.Load()
	if list == nil {
		n.mu.Lock()
		l := make([]*QP, 0, len(n.qps))
		for _, q := range n.qps {
			l = append(l, q)
		}
		n.qpList.Store(&l)
		n.mu.Unlock()
		list = &l
	}
	for _, q := range *list {
		f(q)
	}
}

func (n *NIC) eachInbound(f func(*inbound)) {
	n.eachQP(func(q *QP) { q.eachInbound(f) })
}

// drainSenders waits until every operation that this NIC initiates and that began before has ended; datagrams
// are sent with the sender's sq held as well.
func (n *NIC) drainSenders() {
	n.eachQP(func(q *QP) {
		q.sq.Lock()
		q.sq.Unlock() //lint:ignore SA2001 waiting for the holder is the point
	})
}

func (n *NIC) addCQ(c *CQ) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return driver.ErrClosed
	}
	n.cqs[c] = true
	return nil
}

func (n *NIC) dropCQ(c *CQ) {
	n.mu.Lock()
	delete(n.cqs, c)
	n.mu.Unlock()
}

func (n *NIC) eachCQ(f func(*CQ)) {
	n.mu.Lock()
	list := make([]*CQ, 0, len(n.cqs))
	for c := range n.cqs {
		list = append(list, c)
	}
	n.mu.Unlock()
	for _, c := range list {
		f(c)
	}
}

func (n *NIC) addChannel(ch *CompChannel) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return driver.ErrClosed
	}
	n.nextChan++
	ch.id = n.nextChan
	n.channels[ch] = true
	return nil
}

func (n *NIC) dropChannel(ch *CompChannel) {
	n.mu.Lock()
	delete(n.channels, ch)
	n.mu.Unlock()
	n.eachLink(func(l *link) { l.untell(dropChannel, ch.id) })
}

func (n *NIC) addSRQ(s *SRQ) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return driver.ErrClosed
	}
	n.nextSRQ++
	s.id = n.nextSRQ
	n.srqs[s] = true
	return nil
}

func (n *NIC) dropSRQ(s *SRQ) {
	n.mu.Lock()
	delete(n.srqs, s)
	n.mu.Unlock()
	n.eachLink(func(l *link) { l.untell(dropSRQ, s.id) })
}

func (n *NIC) eachSRQ(f func(*SRQ)) {
	n.mu.Lock()
	list := make([]*SRQ, 0, len(n.srqs))
	for s := range n.srqs {
		list = append(list, s)
	}
	n.mu.Unlock()
	for _, s := range list {
		f(s)
	}
}

func (n *NIC) addAH(a *AH) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return driver.ErrClosed
	}
	var list []*AH
	if old := n.ahs.Load(); old != nil {
		list = append(list, *old...)
	}
	if k := len(n.freeAHs); k > 0 {
		a.num = n.freeAHs[k-1] // another one than last time: what was posted before and is not sent yet is not for this one
		n.freeAHs = n.freeAHs[:k-1]
	} else {
		if len(list) == 0 {
			list = append(list, nil) // number 0 is no handle
		}
		if len(list) >= maxAHs {
			return fmt.Errorf("the software NIC has %d address handles at most", maxAHs-1)
		}
		a.num = ib.AHNum(len(list))
		list = append(list, nil)
	}
	list[a.num&ahIndex] = a
	n.ahs.Store(&list)
	return nil
}

func (n *NIC) dropAH(a *AH) {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := append([]*AH(nil), *n.ahs.Load()...)
	list[a.num&ahIndex] = nil
	n.freeAHs = append(n.freeAHs, a.num+ahIndex+1)
	n.ahs.Store(&list)
}

func (n *NIC) ah(k ib.AHNum) *AH {
	list := n.ahs.Load()
	if list == nil || int(k&ahIndex) >= len(*list) {
		return nil
	}
	if a := (*list)[k&ahIndex]; a != nil && a.num == k {
		return a
	}
	return nil
}
