package softnic

import (
	"testing"
)

// A peer that asks and asks and does not read the answers is cut off before they fill memory.
func TestPeerThatDoesNotRead(t *testing.T) {
	_, nb, _, _ := joined(t)
	l := nb.onlyLink(t)
	box := newMailbox[packet]()
	w := &socketWriter{box: box} // nobody empties it, as with a peer that does not read
	data := make([]byte, assistChunk)
	var err error
	sent := 0
	for ; err == nil && sent < outLimit; sent++ {
		err = w.send(ctl{kind: ctlAssisted, data: data})
	}
	if queued := sent * assistChunk; err != errLinkBusy || queued > 1<<30 {
		t.Errorf("%d bytes wait for the peer, and the error is %v", queued, err)
	}
	if l.reason() != nil {
		t.Error(l.reason())
	}
}
