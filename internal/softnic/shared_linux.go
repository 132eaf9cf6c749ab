package softnic

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/softnic/unixmsg"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Between processes, NICs meet on Unix sockets of type SOCK_SEQPACKET in the abstract namespace, whose name contains the GID.
// Abstract names belong to a network namespace and vanish with the process, so there is nothing to clean up. The first
// message each way is a hello (the dialler's first, the other side's when it agrees) or a refusal with the reason.

// door is where other processes knock.
type door struct {
	l  *net.UnixListener
	wg sync.WaitGroup

	mu     sync.Mutex
	silent []caller      // have not said hello yet, oldest first
	room   chan struct{} // kicked when one of them leaves
}

// caller is a connection that was accepted at that time.
type caller struct {
	c  *net.UnixConn
	at time.Time
}

// leave takes a caller off the list of the silent ones: it has spoken, or hung up.
func (d *door) leave(c *net.UnixConn) {
	d.mu.Lock()
	d.silent = slices.DeleteFunc(d.silent, func(s caller) bool { return s.c == c })
	d.mu.Unlock()
	select {
	case d.room <- struct{}{}:
	default:
	}
}

// enter puts a caller on the list. When it is full of callers that say nothing, the oldest makes room: others who have
// something to say wait in line behind them.
func (d *door) enter(c *net.UnixConn) {
	for {
		d.mu.Lock()
		if len(d.silent) < handshakes {
			d.silent = append(d.silent, caller{c, time.Now()})
			d.mu.Unlock()
			return
		}
		oldest := d.silent[0]
		left := crowdedMax - time.Since(oldest.at)
		if left <= 0 {
			d.silent = d.silent[1:]
			oldest.c.SetDeadline(time.Unix(1, 0)) // its goroutine closes it
		}
		d.mu.Unlock()
		if left <= 0 {
			continue
		}
		select {
		case <-d.room:
		case <-time.After(left):
		}
	}
}

const (
	refuseTwice  = "duplicate"
	handshakes   = 256                   // callers that have not said hello
	handshakeMax = time.Second           // how long they may take to do so
	crowdedMax   = 50 * time.Millisecond // and how long when others wait
)

// openShared makes the NIC reachable for other processes.
func (n *NIC) openShared() error {
	if os.Getenv("RINGSIDE_SOFT_SHM") == "0" {
		return errors.New("shared memory is switched off by RINGSIDE_SOFT_SHM=0")
	}
	reg, err := mem.Alloc(maxMRs*4, mem.Options{Name: "ringside-regions", Huge: mem.HugeNever})
	if err != nil {
		return err
	}
	l, err := net.ListenUnix("unixpacket", observe.SocketName(n.gid))
	if err != nil {
		reg.Close()
		return fmt.Errorf("listening for other processes: %w", err)
	}
	n.liveReg = reg
	n.regions.init(reg.Bytes(), reg.FD())
	n.shared = true
	n.door = &door{l: l, room: make(chan struct{}, 1)}
	n.door.wg.Add(1)
	go n.answerDoor()
	return nil
}

func (n *NIC) closeShared() {
	if n.door == nil {
		return
	}
	n.door.l.Close()
	n.door.wg.Wait()
}

func (n *NIC) answerDoor() {
	defer n.door.wg.Done()
	for {
		c, err := n.door.l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(time.Millisecond) // out of descriptors: those waiting are served when there are some again
			continue
		}
		// Only processes of one user get as far as to wait.
		if cred, err := unixmsg.PeerCred(c); err == nil {
			if err := checkUser(cred.Uid); err != nil {
				refuse(c, err.Error())
				continue
			}
		}
		c.SetDeadline(time.Now().Add(handshakeMax))
		n.door.enter(c)
		n.door.wg.Go(func() { n.answer(c) })
	}
}

// refuse tells a caller why it is not served, and hangs up.
func refuse(c *net.UnixConn, why string) {
	c.SetWriteDeadline(time.Now().Add(handshakeMax)) // it fits the socket's buffer: it does not wait
	c.Write(append([]byte(observe.Refusal), why...))
	c.Close()
}

// answer takes one caller: an agreeing hello makes a link.
func (n *NIC) answer(c *net.UnixConn) {
	refuse := func(why string) { refuse(c, why) }
	var h hello
	b, fd, err := unixmsg.Read(c, make([]byte, helloSize+1))
	n.door.leave(c)
	if err != nil {
		c.Close()
		return
	}
	defer unixmsg.Close(fdList(fd))
	if observe.Is(b) {
		n.serve(c, b, fd)
		return
	}
	if err := h.decode(b); err != nil {
		refuse(err.Error())
		return
	}
	if h.to != n.gid {
		refuse("another GID was asked for")
		return
	}
	if err := checkPeer(c, &h); err != nil {
		refuse(err.Error())
		return
	}
	if h.from.IsZero() || h.from == n.gid || lookupNIC(h.from) != nil && !fromHere(c) {
		refuse("the greeting names a GID that is somebody else's")
		return
	}
	l, err := n.newShared(c, &h, fd)
	if err != nil {
		refuse(err.Error())
		return
	}
	n.mu.Lock()
	_, dialling := n.dials[h.from]
	switch {
	case n.closed:
		n.mu.Unlock()
		l.abandon()
		refuse("the device is closed")
		return
	case n.links[h.from] != nil || dialling && string(n.gid[:]) < string(h.from[:]):
		// Both call at once: the call of the lower GID stands.
		n.mu.Unlock()
		l.abandon()
		refuse(refuseTwice)
		return
	}
	if err := n.sendHello(c, h.from); err != nil {
		n.mu.Unlock()
		l.abandon()
		c.Close()
		return
	}
	n.links[h.from] = l
	n.mu.Unlock()
	l.start(c)
}

// sendHello introduces this NIC, with its region table.
func (n *NIC) sendHello(c *net.UnixConn, to ib.GID) error {
	h := identity()
	h.from, h.to = n.gid, to
	if !asymmetric() {
		h.flags |= helloFences
	}
	fd, done, err := shareFD(n.liveReg.FD(), false)
	if err != nil {
		return err
	}
	defer done()
	_, _, err = c.WriteMsgUnix(h.encode(), unix.UnixRights(fd), nil)
	return err
}

// newShared builds the link to a NIC that has said hello, with its region table fd.
func (n *NIC) newShared(c *net.UnixConn, h *hello, fd int) (*link, error) {
	if fd < 0 {
		return nil, errors.New("the greeting brought no region table")
	}
	reg, err := mem.MapFD(fd, 0, maxMRs*4, false)
	if err != nil {
		return nil, err
	}
	l := newLink(n, h.from, pathShm)
	l.full = !asymmetric() || h.flags&helloFences != 0
	l.peerMem = reg
	l.peerLive = words32(reg.Bytes())
	l.out = &socketWriter{c: c, box: newMailbox[packet]()}
	return l, nil
}

// abandon frees a link that never came to be.
func (l *link) abandon() { l.peerMem.Close() }

// start begins to read and write control messages.
func (l *link) start(c *net.UnixConn) {
	c.SetDeadline(time.Time{})
	w := l.out.(*socketWriter)
	go w.run(func(err error) { l.nic.later(func() { l.close(err) }) })
	go l.readShared(c)
}

// dialShared reaches the NIC with the GID in another process.
func (n *NIC) dialShared(ctx context.Context, g ib.GID) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	fail := func(why any) error {
		return fmt.Errorf("%w: GID %v over shared memory: %v", driver.ErrUnreachable, g, why)
	}
	for {
		l, again, err := n.dialOnce(ctx, g)
		switch {
		case l != nil:
			return l, nil
		case errors.Is(err, errHungUp) && ctx.Err() == nil: // a crowd is at its door, or it closes: then the next call says so
		case err != nil:
			if ctx.Err() != nil {
				err = fmt.Errorf("no answer within %v", linkTimeout)
			}
			return nil, fail(err)
		}
		// again: the peer calls us at the same time, and its call stands: it is about to arrive. Or the peer has not noticed
		// yet that an earlier link between us has ended, and will take the next call.
		for range 20 {
			if again {
				n.mu.Lock()
				l = n.links[g]
				n.mu.Unlock()
				if l != nil {
					return l, nil
				}
			}
			select {
			case <-ctx.Done():
				if again {
					return nil, fail("the peer's own call did not arrive")
				}
				return nil, fail(err)
			case <-time.After(time.Millisecond):
			}
		}
	}
}

var errHungUp = errors.New("the peer hung up")

var errNotHere = errors.New("no process with that software NIC in this network namespace: it has ended, or it runs on another " +
	"host or in another container, which shared memory does not reach")

func (n *NIC) dialOnce(ctx context.Context, g ib.GID) (l *link, again bool, err error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", observe.SocketName(g).Name)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
			err = errNotHere
		}
		return nil, false, err
	}
	c := nc.(*net.UnixConn)
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		stop()
		if err != nil || again {
			c.Close()
		}
	}()
	if err := n.sendHello(c, g); err != nil && !errors.Is(err, syscall.EPIPE) { // refused already: the reason can be read
		return nil, false, err
	}
	b, fd, err := unixmsg.Read(c, make([]byte, 512))
	if errors.Is(err, syscall.ECONNRESET) { // it hung up before it read the greeting: its reason comes behind this error
		b, fd, err = unixmsg.Read(c, make([]byte, 512))
	}
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			err = errHungUp
		}
		return nil, false, err
	}
	defer unixmsg.Close(fdList(fd))
	if why, ok := strings.CutPrefix(string(b), observe.Refusal); ok {
		if why == refuseTwice {
			return nil, true, nil
		}
		return nil, false, fmt.Errorf("refused by the peer: %s", printable([]byte(why)))
	}
	var h hello
	if err := h.decode(b); err != nil {
		return nil, false, err
	}
	if h.from != g || h.to != n.gid {
		return nil, false, errors.New("another NIC answered")
	}
	if err := checkPeer(c, &h); err != nil {
		return nil, false, err
	}
	if l, err = n.newShared(c, &h, fd); err != nil {
		return nil, false, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		l.abandon()
		return nil, false, driver.ErrClosed
	}
	if n.links[g] != nil {
		l.abandon()
		return n.links[g], true, nil
	}
	if !stop() {
		l.abandon()
		return nil, false, ctx.Err()
	}
	n.links[g] = l
	l.start(c)
	return l, false, nil
}
