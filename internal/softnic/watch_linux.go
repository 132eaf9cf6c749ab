package softnic

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/unixmsg"
)

// serve does what an observer asks for with b, its first message, and the descriptor that came along; it closes c when that is done.
// The observer is a process of this user.
func (n *NIC) serve(c *net.UnixConn, b []byte, fd int) {
	n.serveAnd(c, b, fd, func() {})
}

// serveAnd calls answered once the observer has heard something.
func (n *NIC) serveAnd(c *net.UnixConn, b []byte, fd int, answered func()) {
	var r observe.Request
	err := r.Decode(b)
	switch {
	case err != nil:
		refuse(c, err.Error())
	case r.To != n.gid && !r.To.IsZero():
		refuse(c, "another GID was asked for")
	case r.What == observe.Counters:
		n.tellCounters(c)
		c.Close()
	case r.What == observe.Packets:
		n.showPackets(c, &r, fd, answered)
		return
	default:
		refuse(c, "this version of the software NIC does not know what was asked for")
	}
	answered()
}

func (n *NIC) answerOf() []byte {
	a := observe.Answer{GID: n.gid, Program: filepath.Base(os.Args[0])}
	return a.Encode()
}

// tellCounters answers with the counters in a memory file: they can be longer than a message.
func (n *NIC) tellCounters(c *net.UnixConn) {
	text, err := observe.EncodeNIC(n.Counters())
	if err != nil {
		refuse(c, err.Error())
		return
	}
	reg, err := mem.Alloc(len(text), mem.Options{Name: "ringside-counters", Huge: mem.HugeNever})
	if err != nil {
		refuse(c, err.Error())
		return
	}
	defer reg.Close()
	b := reg.Bytes()
	for i := copy(b, text); i < len(b); i++ {
		b[i] = ' ' // which JSON does not mind
	}
	fd, done, err := shareFD(reg.FD(), false)
	if err != nil {
		refuse(c, err.Error())
		return
	}
	defer done()
	c.WriteMsgUnix(n.answerOf(), unix.UnixRights(fd), nil)
}

// showPackets shows an observer packets until it hangs up, or the NIC is closed.
func (n *NIC) showPackets(c *net.UnixConn, r *observe.Request, fd int, answered func()) {
	defer answered()
	defer c.Close()
	if fd < 0 || r.SnapLen < roce.BTHLen {
		refuse(c, "the request brings no memory, or wants too little of packets")
		return
	}
	reg, err := mem.MapFD(fd, 0, int(r.Ring), true)
	if err != nil {
		refuse(c, err.Error())
		return
	}
	defer reg.Close()
	t := &tap{snap: int(min(r.SnapLen, observe.MaxData))}
	if t.ring, err = observe.NewProducer(reg.Bytes()[:r.Ring]); err != nil {
		refuse(c, err.Error())
		return
	}
	n.watch.mu.Lock()
	if n.watch.closed {
		n.watch.mu.Unlock()
		refuse(c, "the device is closed")
		return
	}
	if n.watch.conns == nil {
		n.watch.conns = map[io.Closer]bool{}
	}
	n.watch.conns[c] = true
	n.watch.mu.Unlock()
	defer func() {
		n.watch.mu.Lock()
		delete(n.watch.conns, c)
		n.watch.mu.Unlock()
	}()
	if !n.addTap(t) {
		refuse(c, "it has as many observers as it can have")
		return
	}
	defer n.dropTap(t)
	if _, err := c.Write(n.answerOf()); err != nil {
		return
	}
	answered()
	c.SetDeadline(time.Time{})
	var b [1]byte
	c.Read(b[:]) // the observer says nothing more
}

// joinCapture calls the observer that the environment names, if there is one, and waits until it has what it needs: so it sees the
// first packet, too. Without an observer, the NIC is as ever.
func (n *NIC) joinCapture() {
	name := os.Getenv(observe.EnvCapture)
	if !strings.HasPrefix(name, "@") {
		return
	}
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: name})
	if err != nil {
		return
	}
	cred, err := unixmsg.PeerCred(c)
	if err != nil || checkUser(cred.Uid) != nil {
		c.Close()
		return
	}
	c.SetDeadline(time.Now().Add(handshakeMax))
	b, fd, err := unixmsg.Read(c, make([]byte, helloSize+1))
	if err != nil {
		c.Close()
		return
	}
	ready := make(chan struct{})
	var once sync.Once
	n.watch.wg.Go(func() {
		defer unixmsg.Close(fdList(fd))
		n.serveAnd(c, b, fd, func() { once.Do(func() { close(ready) }) })
	})
	<-ready
}

// unwatch ends with all observers.
func (n *NIC) unwatch() {
	n.watch.mu.Lock()
	n.watch.closed = true
	for c := range n.watch.conns {
		c.Close()
	}
	n.watch.mu.Unlock()
	n.watch.wg.Wait()
}
