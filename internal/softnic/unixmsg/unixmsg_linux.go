package unixmsg

import (
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// ErrMessage: a message was cut off, or came with more than it may.
var ErrMessage = errors.New("a malformed message on a Unix socket")

// Read reads one message of a SOCK_SEQPACKET socket, and the descriptor that comes with it; -1: none. More of those are closed, and
// make the message invalid, as does being longer than buf. The descriptor is the caller's.
func Read(c *net.UnixConn, buf []byte) ([]byte, int, error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, -1, err
	}
	var fds []int
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return nil, -1, ErrMessage
		}
		for i := range msgs {
			if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
				fds = append(fds, got...)
			}
		}
	}
	if n == 0 && len(fds) == 0 {
		return nil, -1, io.EOF
	}
	if len(fds) > 1 || flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		Close(fds)
		return nil, -1, ErrMessage
	}
	if len(fds) == 1 {
		return buf[:n], fds[0], nil
	}
	return buf[:n], -1, nil
}

// Close closes descriptors.
func Close(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// PeerCred returns who has connected, as the kernel knows it.
func PeerCred(c *net.UnixConn) (*unix.Ucred, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	return cred, cerr
}
