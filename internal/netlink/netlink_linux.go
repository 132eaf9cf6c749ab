package netlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A Message is a netlink request under construction: header, body, attributes.
type Message []byte

// NewMessage starts a request that the kernel acknowledges. body is the fixed structure that the type begins with.
func NewMessage(typ uint16, flags uint16, body []byte) Message {
	m := Message(make([]byte, unix.SizeofNlMsghdr, 256))
	binary.NativeEndian.PutUint16(m[4:], typ)
	binary.NativeEndian.PutUint16(m[6:], unix.NLM_F_REQUEST|flags)
	return append(m, body...).aligned()
}

func (m Message) aligned() Message { return append(m, make([]byte, -len(m)&3)...) }

// Attr adds an attribute.
func (m Message) Attr(typ uint16, value []byte) Message {
	m = binary.NativeEndian.AppendUint16(m, uint16(unix.SizeofNlAttr+len(value)))
	m = binary.NativeEndian.AppendUint16(m, typ)
	return append(m, value...).aligned()
}

// Text adds a string, which the kernel wants to end in a zero.
func (m Message) Text(typ uint16, s string) Message { return m.Attr(typ, append([]byte(s), 0)) }

// U32 adds a number.
func (m Message) U32(typ uint16, v uint32) Message {
	return m.Attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// Nested adds an attribute that holds what inner adds to an empty message.
func (m Message) Nested(typ uint16, inner func(Message) Message) Message {
	return m.Attr(typ, inner(nil))
}

// Finish fills in what is known last.
func (m Message) Finish(seq uint32) Message {
	binary.NativeEndian.PutUint32(m, uint32(len(m)))
	binary.NativeEndian.PutUint32(m[8:], seq)
	return m
}

// Attributes calls fn for each attribute in b.
func Attributes(b []byte, fn func(typ uint16, value []byte)) error {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return errors.New("netlink: an attribute of impossible length")
		}
		fn(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

// A Conn is a netlink socket. It is not safe for concurrent use.
type Conn struct {
	fd  int
	seq uint32
}

// Dial opens a socket of a netlink protocol, such as unix.NETLINK_RDMA.
func Dial(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink: no socket of protocol %d: %w", protocol, err)
	}
	// The kernel's own words for an error, where it has any. Without them there is still the errno.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	return &Conn{fd: fd}, nil
}

// Close closes the socket.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// Do sends a request and waits for its acknowledgement.
func (c *Conn) Do(m Message) error {
	binary.NativeEndian.PutUint16(m[6:], binary.NativeEndian.Uint16(m[6:])|unix.NLM_F_ACK)
	return c.exchange(m, nil)
}

// Get sends a request, calls fn with what follows the header of each answer, and waits for the acknowledgement.
func (c *Conn) Get(m Message, fn func(body []byte)) error {
	binary.NativeEndian.PutUint16(m[6:], binary.NativeEndian.Uint16(m[6:])|unix.NLM_F_ACK)
	return c.exchange(m, fn)
}

// Dump asks for all objects of a kind and calls fn with what follows the header of each answer.
func (c *Conn) Dump(m Message, fn func(body []byte)) error {
	binary.NativeEndian.PutUint16(m[6:], binary.NativeEndian.Uint16(m[6:])|unix.NLM_F_DUMP)
	return c.exchange(m, fn)
}

func (c *Conn) exchange(m Message, fn func(body []byte)) error {
	c.seq++
	if err := unix.Sendto(c.fd, m.Finish(c.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("netlink: send: %w", err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("netlink: receive: %w", err)
		}
		done, err := replies(buf[:n], c.seq, fn)
		if done || err != nil {
			return err
		}
	}
}

// replies judges the messages of one datagram. done is whether the request with number seq has been answered in full.
func replies(b []byte, seq uint32, fn func(body []byte)) (done bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return false, errors.New("netlink: a message of impossible length")
		}
		typ, flags, body := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), b[unix.SizeofNlMsghdr:n]
		if binary.NativeEndian.Uint32(b[8:]) == seq {
			switch typ {
			case unix.NLMSG_ERROR:
				return true, ackError(flags, body)
			case unix.NLMSG_DONE:
				return true, doneError(flags, body)
			default:
				if fn != nil {
					fn(body)
				}
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return false, nil
}

// ackError is the error in an acknowledgement: an errno, the request's header, and possibly attributes with a text.
func ackError(flags uint16, body []byte) error {
	if len(body) < 4+unix.SizeofNlMsghdr {
		return errors.New("netlink: a short acknowledgement")
	}
	rest := body[4+unix.SizeofNlMsghdr:]
	if flags&unix.NLM_F_CAPPED == 0 { // the request follows in full
		request := int(binary.NativeEndian.Uint32(body[4:]))
		rest = body[min(4+max(request, unix.SizeofNlMsghdr), len(body)):]
	}
	return errnoError(flags, body, rest)
}

// doneError is the error in the end of a dump, which has no other acknowledgement: an errno, and possibly attributes with a text.
func doneError(flags uint16, body []byte) error {
	if len(body) < 4 {
		return nil
	}
	return errnoError(flags, body, body[4:])
}

// errnoError is the errno that body begins with, with what the attributes in rest say of it.
func errnoError(flags uint16, body, rest []byte) error {
	errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
	if errno == 0 {
		return nil
	}
	why := ""
	if flags&unix.NLM_F_ACK_TLVS != 0 {
		_ = Attributes(rest, func(typ uint16, value []byte) {
			if typ == unix.NLMSGERR_ATTR_MSG {
				why = string(bytes.TrimRight(value, "\x00"))
			}
		})
	}
	if why != "" {
		return fmt.Errorf("%w (%s)", errno, why)
	}
	return errno
}
