package softnic

// A local link joins two NICs of one process: control messages go through mailboxes, memory is shared as it is.

type localWriter struct {
	to   *mailbox[ctl] // the other end's messages
	mine *mailbox[ctl] // ours, to end our reader
}

func (w *localWriter) send(m ctl) error {
	if w.to.put(m) < 0 {
		return errPeerGone
	}
	return nil
}

func (w *localWriter) close(error) {
	w.to.close()
	w.mine.close()
}

// localLinks joins a and b, which may be the same NIC, and returns a's end.
func localLinks(a, b *NIC) (la, lb *link) {
	la = newLink(a, b.gid, pathInproc)
	la.full = !asymmetric()
	la.peerLive = b.regions.live
	boxA := newMailbox[ctl]()
	if a == b {
		la.out = &localWriter{to: boxA, mine: boxA}
		go la.readLocal(boxA)
		return la, la
	}
	lb = newLink(b, a.gid, pathInproc)
	lb.full = la.full
	lb.peerLive = a.regions.live
	boxB := newMailbox[ctl]()
	la.out = &localWriter{to: boxB, mine: boxA}
	lb.out = &localWriter{to: boxA, mine: boxB}
	go la.readLocal(boxA)
	go lb.readLocal(boxB)
	return la, lb
}

func (l *link) readLocal(box *mailbox[ctl]) {
	var batch []ctl
	for {
		if batch = box.take(batch); batch == nil {
			l.close(errPeerGone)
			return
		}
		for i := range batch {
			if err := l.handle(&batch[i]); err != nil {
				l.close(err)
				box.close()
				return
			}
		}
	}
}
