package softnic

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/softnic/unixmsg"
)

// outLimit is how many control messages may wait for a peer before it counts as stuck. Ten thousand QPs that connect at once
// make some tens of thousands.
const outLimit = 1 << 18

// outBytes is outLimit in bytes: ten thousand QPs that all read private memory at once stay below it.
const outBytes = 512 << 20

// packet is an encoded control message on its way out; it owns its descriptor.
type packet struct {
	b  []byte
	fd int
}

// socketWriter sends control messages from a goroutine of its own, so that nobody blocks on a slow peer.
type socketWriter struct {
	c      *net.UnixConn
	box    *mailbox[packet]
	queued atomic.Int64 // bytes in box
}

func (w *socketWriter) send(m ctl) error {
	p := packet{b: m.encode(make([]byte, 0, ctlHeader+len(m.data))), fd: -1}
	if m.hasFD {
		fd, err := unix.FcntlInt(uintptr(m.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("passing memory to the peer: %w (raise the limit on open files: ulimit -n)", err)
		}
		p.fd = fd
	}
	if w.queued.Add(int64(len(p.b))) > outBytes {
		unixmsg.Close(fdList(p.fd))
		return errLinkBusy
	}
	n := w.box.put(p)
	if n < 0 {
		unixmsg.Close(fdList(p.fd))
		return errPeerGone
	}
	if n > outLimit {
		return errLinkBusy
	}
	return nil
}

func (w *socketWriter) close(error) { w.box.close() }

// run writes until the mailbox is closed and empty; then it ends the connection, which ends the reader.
func (w *socketWriter) run(fail func(error)) {
	defer w.c.Close()
	var batch []packet
	broken := false
	for {
		if batch = w.box.take(batch); batch == nil {
			return
		}
		for _, p := range batch {
			var oob []byte
			if p.fd >= 0 {
				oob = unix.UnixRights(p.fd)
			}
			if !broken {
				w.c.SetWriteDeadline(time.Now().Add(busyLimit)) // a peer that stops reading must not keep us from ending
				if _, _, err := w.c.WriteMsgUnix(p.b, oob, nil); err != nil {
					broken = true
					fail(fmt.Errorf("%w: %v", errPeerGone, err))
				}
			}
			w.queued.Add(-int64(len(p.b)))
			unixmsg.Close(fdList(p.fd))
		}
	}
}

func (l *link) readShared(c *net.UnixConn) {
	buf := make([]byte, ctlHeader+ctlMaxData+1)
	end := func(err error) { l.nic.later(func() { l.close(err) }) }
	for {
		b, fd, err := unixmsg.Read(c, buf)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
				err = errPeerGone
			}
			end(err)
			return
		}
		var m ctl
		err = m.decode(b)
		if err == nil && m.hasFD != (fd >= 0) {
			err = errCtl
		}
		m.fd = fd
		if err == nil {
			err = l.handle(&m)
		}
		unixmsg.Close(fdList(fd))
		if err != nil {
			if !errors.Is(err, errPeerGone) {
				err = fmt.Errorf("%w: %w", errPeerFault, err)
			}
			end(err)
			return
		}
	}
}

func fdList(fd int) []int {
	if fd < 0 {
		return nil
	}
	return []int{fd}
}

// remoteWaker returns our duplicate of the eventfd that wakes the peer's completion channel. The descriptor must be a non-blocking eventfd: a write to anything else could hang us.
func remoteWaker(fd int) (int, error) {
	if s, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err != nil || !strings.HasPrefix(s, "anon_inode:[eventfd") {
		return -1, fmt.Errorf("completion channel: %w: not an eventfd", errCtl)
	}
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil || fl&unix.O_NONBLOCK == 0 {
		return -1, fmt.Errorf("completion channel: %w: its eventfd blocks", errCtl)
	}
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

func wakeFD(fd int) { unix.Write(fd, one) }

// shareFD returns a descriptor of a memory file to pass to a peer: the file itself, or one that only reads.
func shareFD(fd int, writable bool) (int, func(), error) {
	if writable {
		return fd, func() {}, nil
	}
	ro, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, nil, fmt.Errorf("opening memory read-only for a peer: %w", err)
	}
	return ro, func() { unix.Close(ro) }, nil
}
