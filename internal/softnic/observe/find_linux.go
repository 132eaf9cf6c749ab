package observe

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/softnic/unixmsg"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// socketPrefix begins the names of the sockets that NICs can be met at; the GID follows.
const socketPrefix = "@ringside-soft-"

// SocketName is the abstract address of the NIC with the GID.
func SocketName(g ib.GID) *net.UnixAddr {
	return &net.UnixAddr{Net: "unixpacket", Name: socketPrefix + hex.EncodeToString(g[:])}
}

// Refusal begins the message of a NIC that does not do what it is asked for; the reason follows.
const Refusal = "ringside refuse\n"

// answerTime bounds how long a NIC may take to answer.
const answerTime = 2 * time.Second

// GIDs returns the NICs of this network namespace, of all users.
func GIDs() ([]ib.GID, error) {
	b, err := os.ReadFile("/proc/thread-self/net/unix") // the thread's: its namespace can be another one than the process's
	if err != nil {
		return nil, fmt.Errorf("looking for software NICs: %w", err)
	}
	return gidsOf(b), nil
}

// gidsOf finds the NICs in a list of Unix sockets as /proc has it: a line each, with the name at its end, and in the fourth column
// whether it listens.
func gidsOf(list []byte) (all []ib.GID) {
	const listens = "00010000" // __SO_ACCEPTCON
	for lines := bufio.NewScanner(bytes.NewReader(list)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) != 8 || f[3] != listens {
			continue
		}
		name, ok := strings.CutPrefix(f[7], socketPrefix)
		if id, err := hex.DecodeString(name); ok && err == nil && len(id) == 16 {
			all = append(all, ib.GID(id))
		}
	}
	return all
}

// dial connects to a NIC.
func dial(ctx context.Context, g ib.GID) (*net.UnixConn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", SocketName(g).Name)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
			err = ErrGone
		}
		return nil, fmt.Errorf("software NIC %v: %w", g, err)
	}
	return c.(*net.UnixConn), nil
}

// ask sends a request, with a memory file unless fd is -1, and returns the answer with the descriptor that came along.
func ask(c *net.UnixConn, r *Request, fd int) (a Answer, got int, err error) {
	fail := func(err error) (Answer, int, error) {
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			err = ErrGone
		}
		return Answer{}, -1, fmt.Errorf("software NIC %v: %w", r.To, err)
	}
	c.SetDeadline(time.Now().Add(answerTime))
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	if _, _, err := c.WriteMsgUnix(r.Encode(), oob, nil); err != nil && !errors.Is(err, syscall.EPIPE) { // refused already: the reason can be read
		return fail(err)
	}
	buf := make([]byte, 512)
	b, got, err := unixmsg.Read(c, buf)
	if errors.Is(err, syscall.ECONNRESET) { // it hung up before it read the request: its reason comes behind this error
		b, got, err = unixmsg.Read(c, buf)
	}
	if err != nil {
		return fail(err)
	}
	if why, ok := strings.CutPrefix(string(b), Refusal); ok {
		err = errors.New(printable([]byte(why)))
	} else if err = a.Decode(b); err == nil && !r.To.IsZero() && a.GID != r.To {
		err = errors.New("another software NIC has answered")
	}
	if err != nil {
		if got >= 0 {
			unix.Close(got)
		}
		return fail(err)
	}
	c.SetDeadline(time.Time{})
	return a, got, nil
}

// pid returns the process at the other end, 0 if it is in a PID namespace that cannot be seen.
func pid(c *net.UnixConn) int {
	cred, err := unixmsg.PeerCred(c)
	if err != nil {
		return 0
	}
	return int(cred.Pid)
}

// ReadNIC returns the counters of a NIC.
func ReadNIC(ctx context.Context, g ib.GID) (*NIC, error) {
	c, err := dial(ctx, g)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	a, fd, err := ask(c, &Request{What: Counters, To: g}, -1)
	if err != nil {
		return nil, err
	}
	if fd < 0 {
		return nil, fmt.Errorf("software NIC %v: %w", g, errMessage)
	}
	f := os.NewFile(uintptr(fd), "counters")
	defer f.Close()
	// It is read, not mapped: another process can change or shrink it meanwhile.
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxCounters {
		return nil, fmt.Errorf("software NIC %v: counters of %d bytes: %w", g, st.Size(), errMessage)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, st.Size()))
	if err != nil {
		return nil, err
	}
	n, err := DecodeNIC(b)
	if err != nil {
		return nil, err
	}
	n.GID, n.PID, n.Program = g.String(), pid(c), a.Program
	return n, nil
}

// A Source is a NIC that is being captured. Its methods are for one goroutine at a time, but Ended.
type Source struct {
	GID     ib.GID
	PID     int // 0: it cannot be seen
	Program string

	conn  *net.UnixConn
	mem   *mem.Region
	ring  *Consumer
	ended atomic.Bool
	gone  chan struct{} // the goroutine that waits for the end has ended
}

// Attach begins to capture a NIC: of each packet snap bytes from the BTH on, through a ring of so many bytes.
func Attach(ctx context.Context, g ib.GID, snap, ring int) (*Source, error) {
	c, err := dial(ctx, g)
	if err != nil {
		return nil, err
	}
	return attach(c, g, snap, ring)
}

// attach is Attach at a connection, which it takes over; g is zero if it was the NIC that called.
func attach(c *net.UnixConn, g ib.GID, snap, ring int) (*Source, error) {
	reg, err := mem.Alloc(RingFile(ring), mem.Options{Name: "ringside-capture", Huge: mem.HugeNever})
	if err != nil {
		c.Close()
		return nil, err
	}
	s := &Source{PID: pid(c), conn: c, mem: reg, gone: make(chan struct{})}
	s.ring, err = NewConsumer(reg.Bytes())
	var a Answer
	got := -1
	if err == nil {
		a, got, err = ask(c, &Request{What: Packets, SnapLen: uint32(snap), Ring: uint32(len(reg.Bytes())), To: g}, reg.FD())
	}
	if got >= 0 {
		unix.Close(got)
	}
	if err != nil {
		c.Close()
		reg.Close()
		return nil, err
	}
	s.GID, s.Program = a.GID, a.Program
	go func() {
		defer close(s.gone)
		var b [1]byte
		c.Read(b[:]) // the NIC says nothing more
		s.ended.Store(true)
	}()
	return s, nil
}

// Next reads the next packet, if there is one; it is valid until the next call. After an error, nothing more can be read.
func (s *Source) Next(r *Record) (bool, error) {
	ok, err := s.ring.Next(r)
	if err != nil {
		err = fmt.Errorf("software NIC %v (pid %d): %w", s.GID, s.PID, err)
	}
	return ok, err
}

// Lost returns how many packets there was no room for in the ring.
func (s *Source) Lost() uint64 { return s.ring.Lost() }

// Ended reports whether the NIC has ended. What it had sent before can still be read, and no more: so first ask, then read. Like Next, it
// is for one goroutine at a time.
func (s *Source) Ended() bool {
	if !s.ended.Load() {
		return false
	}
	s.ring.finish()
	return true
}

// Close ends the capture.
func (s *Source) Close() {
	s.conn.Close()
	<-s.gone
	s.mem.Close()
}

// A Listener is where NICs call that are to be captured from their first packet on: see EnvCapture.
type Listener struct {
	l *net.UnixListener
	// Name is the value of EnvCapture.
	Name string
}

// Listen opens a Listener.
func Listen() (*Listener, error) {
	var id [8]byte
	if _, err := io.ReadFull(rand.Reader, id[:]); err != nil {
		return nil, err
	}
	name := "@ringside-capture-" + hex.EncodeToString(id[:])
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: name})
	if err != nil {
		return nil, fmt.Errorf("listening for software NICs: %w", err)
	}
	return &Listener{l: l, Name: name}, nil
}

// Accept waits for the next NIC of this user, and begins to capture it. net.ErrClosed says that the Listener is closed; other errors concern one NIC only.
func (l *Listener) Accept(snap, ring int) (*Source, error) {
	c, err := l.l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	if cred, err := unixmsg.PeerCred(c); err != nil || int(cred.Uid) != os.Geteuid() {
		c.Close()
		return nil, errors.New("a process of another user has called")
	}
	return attach(c, ib.GID{}, snap, ring)
}

// Close ends the Listener, and an Accept that waits.
func (l *Listener) Close() error { return l.l.Close() }
