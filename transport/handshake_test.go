package transport_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

func listen(t *testing.T, cfg *transport.Config) *transport.Listener {
	t.Helper()
	c := transport.Config{Device: transporttest.Device}
	if cfg != nil {
		c = *cfg
		c.Device = transporttest.Device
	}
	l, err := transport.Listen(t.Context(), "127.0.0.1:0", &c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// answer sends bytes to the listener and returns the code and text of its reject frame.
func answer(t *testing.T, l *transport.Listener, send []byte, hangUp bool) (transport.HandshakeCode, string) {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.Write(send)
	if hangUp {
		c.(*net.TCPConn).CloseWrite()
	}
	b, err := io.ReadAll(c)
	if err != nil && len(b) == 0 {
		t.Fatal(err)
	}
	if len(b) < 16 || string(b[:4]) != "RSDE" || b[6] != 4 {
		t.Fatalf("answer % x is no reject frame", b)
	}
	return transport.HandshakeCode(binary.LittleEndian.Uint16(b[12:])), string(b[16:])
}

func TestBootstrapRefusals(t *testing.T) {
	l, hurried := listen(t, nil), listen(t, &transport.Config{HandshakeTimeout: time.Second})
	frame := func(version uint16, kind byte, n uint32, body string) []byte {
		b := append([]byte("RSDE"), byte(version), byte(version>>8), kind, 0)
		b = binary.LittleEndian.AppendUint32(b, n)
		return append(b, body...)
	}
	for name, c := range map[string]struct {
		send   []byte
		hangUp bool
		code   transport.HandshakeCode
		text   string
	}{
		"HTTP":              {[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), false, transport.RefusedProtocol, "no ringside peer"},
		"nothing":           {nil, false, transport.RefusedTimeout, "0 bytes"},
		"half a header":     {[]byte("RSDE\x01"), false, transport.RefusedTimeout, "5 bytes"},
		"hung up":           {[]byte("RSDE\x01"), true, transport.RefusedProtocol, "hung up after 5 bytes"},
		"truncated hello":   {frame(1, 1, 100, "only this"), true, transport.RefusedProtocol, "hung up after 21 bytes"},
		"old version":       {frame(0, 1, 0, ""), false, transport.RefusedVersion, "version 0"},
		"new version":       {frame(2, 1, 0, ""), false, transport.RefusedVersion, "version 2"},
		"length":            {frame(1, 1, 1<<31, ""), false, transport.RefusedProtocol, "at most"},
		"kind":              {frame(1, 3, 0, ""), false, transport.RefusedProtocol, "kind 3"},
		"empty hello":       {frame(1, 1, 0, ""), false, transport.RefusedProtocol, "truncated"},
		"hello of zeroes":   {frame(1, 1, 101, strings.Repeat("\x00", 101)), false, transport.RefusedProtocol, "MTU"},
		"unknown token":     {frame(1, 6, 16, strings.Repeat("t", 16)), false, transport.RefusedUnreachable, "no handshake here waits for this connection"},
		"short token":       {frame(1, 6, 3, "abc"), false, transport.RefusedProtocol, "a token of 3 bytes"},
		"garbage as a body": {frame(1, 1, 200, strings.Repeat("\xff", 200)), false, transport.RefusedProtocol, "hello"},
	} {
		t.Run(name, func(t *testing.T) {
			at := l
			if c.code == transport.RefusedTimeout {
				at = hurried
			}
			code, text := answer(t, at, c.send, c.hangUp)
			if code != c.code || !strings.Contains(text, c.text) {
				t.Errorf("refused with %v: %q", code, text)
			}
		})
	}
	// Others are not affected.
	a, b := transporttest.Connect(t, l, &transport.Config{Device: transporttest.Device})
	a.Send(t.Context(), []byte("hello"))
	recvEqual(t, b, []byte("hello"))
}

// TestSlowLoris opens more connections that say nothing than there are handshakes, and gets through all the same.
func TestSlowLoris(t *testing.T) {
	l := listen(t, &transport.Config{MaxHandshakes: 4, HandshakeTimeout: 30 * time.Second})
	var idle []net.Conn
	for range 20 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte("RS"))
		idle = append(idle, c)
	}
	a, b := transporttest.Connect(t, l, &transport.Config{Device: transporttest.Device})
	a.Send(t.Context(), []byte("hello"))
	recvEqual(t, b, []byte("hello"))
	// The oldest was told why it had to go.
	idle[0].SetDeadline(time.Now().Add(20 * time.Second))
	msg := make([]byte, 200)
	n, err := io.ReadAtLeast(idle[0], msg, 20)
	if err != nil || transport.HandshakeCode(binary.LittleEndian.Uint16(msg[12:])) != transport.RefusedBusy {
		t.Errorf("the oldest idle connection got % x, %v", msg[:n], err)
	}
	// Close ends the rest at once.
	l.Close()
}

func TestDialRefused(t *testing.T) {
	serve := func(t *testing.T, answer string) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					c.Write([]byte(answer))
					io.Copy(io.Discard, c)
				}()
			}
		}()
		return l.Addr().String()
	}
	for name, c := range map[string]struct {
		answer string
		code   transport.HandshakeCode
		remote bool
	}{
		"silence":      {"", transport.RefusedTimeout, false},
		"other server": {"SSH-2.0-OpenSSH_9.9\r\n", transport.RefusedProtocol, false},
		"old version":  {"RSDE\x00\x00\x02\x00\x00\x00\x00\x00", transport.RefusedVersion, false},
		"rejected":     {"RSDE\x01\x00\x04\x00\x08\x00\x00\x00\x04\x00\x04\x00nope", transport.RefusedBusy, true},
		"bad reject":   {"RSDE\x01\x00\x04\x00\x08\x00\x00\x00\x04\x00\x05\x00nope", transport.RefusedProtocol, false},
		"bad accept":   {"RSDE\x01\x00\x02\x00\x02\x00\x00\x00xx", transport.RefusedProtocol, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &transport.Config{Device: transporttest.Device, HandshakeTimeout: testutil.Patience}
			if c.answer == "" {
				cfg.HandshakeTimeout = 500 * time.Millisecond
			}
			conn, err := transport.Dial(t.Context(), serve(t, c.answer), cfg)
			if err == nil {
				conn.Close()
				t.Fatal("connected")
			}
			var he *transport.HandshakeError
			if !errors.Is(err, transport.ErrRefused) || !errors.As(err, &he) || he.Code != c.code || he.Remote != c.remote {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := transport.Dial(t.Context(), "127.0.0.1:1", &transport.Config{Device: transporttest.Device}); err == nil {
		t.Error("dialled a port where nobody listens")
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := transport.Dial(ctx, serve(t, ""), &transport.Config{Device: transporttest.Device}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := transport.Dial(t.Context(), "127.0.0.1:1", &transport.Config{TLS: &tls.Config{}}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("TLS: %v", err)
	}
}

func TestListenerClose(t *testing.T) {
	l := listen(t, nil)
	errs := make(chan error, 1)
	go func() {
		_, err := l.Accept(context.Background())
		errs <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := l.Accept(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Accept: %v", err)
	}
	a, b := transporttest.Connect(t, listen(t, nil), &transport.Config{Device: transporttest.Device, Name: "a", PrivateData: []byte("secret")})
	if p := b.Peer(); p.Name != "a" || string(p.PrivateData) != "secret" || len(p.Devices) != 1 || p.Devices[0].Name != transporttest.Device {
		t.Errorf("peer is %+v", p)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := <-errs; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept ended with %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	a.Send(t.Context(), []byte("goes on"))
	recvEqual(t, b, []byte("goes on"))
	if p := a.Path(); p.Rung == "" || p.Device != transporttest.Device || !p.SameHost || p.String() == "" {
		t.Errorf("path %+v", p)
	}
}

// TestNobodyAccepts: a connection that no Accept takes is told so, and does not stay for ever.
func TestNobodyAccepts(t *testing.T) {
	var c *transport.Conn
	for limit := time.Second; c == nil; limit *= 4 { // it is for the handshake, too, which a busy machine may take longer for
		l := listen(t, &transport.Config{HandshakeTimeout: limit})
		var err error
		c, err = transport.Dial(t.Context(), l.Addr().String(), &transport.Config{Device: transporttest.Device, HandshakeTimeout: testutil.Patience})
		if err != nil && limit > testutil.Patience {
			t.Fatal(err)
		}
	}
	defer c.Close()
	<-c.Done()
	if err := c.Err(); !errors.Is(err, transport.ErrPeerClosed) || !strings.Contains(err.Error(), "nobody accepts") {
		t.Errorf("ended with %v", err)
	}
}

// TestCloseDuringHandshake: a peer that says hello and nothing more does not hold up Close.
func TestCloseDuringHandshake(t *testing.T) {
	l := listen(t, &transport.Config{HandshakeTimeout: time.Hour})
	// A relay passes the dialler's hello on, and keeps its ready back.
	relay, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	answered := make(chan net.Conn, 1)
	go func() {
		in, err := relay.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			in.Close()
			return
		}
		buf := make([]byte, 4096)
		n, _ := in.Read(buf)
		out.Write(buf[:n])
		out.Read(buf)
		answered <- out
		io.Copy(io.Discard, in)
		in.Close()
	}()
	ctx, cancel := context.WithCancel(t.Context())
	dialled := make(chan error, 1)
	go func() {
		_, err := transport.Dial(ctx, relay.Addr().String(), &transport.Config{Device: transporttest.Device})
		dialled <- err
	}()
	out := <-answered
	defer out.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-dialled; !errors.Is(err, context.Canceled) {
		t.Errorf("Dial: %v", err)
	}
}

func TestNoRoom(t *testing.T) {
	vctx := transporttest.Context(t)
	p, err := transport.NewPoller(vctx, &transport.PollerConfig{MaxConns: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	l, err := transport.Listen(t.Context(), "127.0.0.1:0", &transport.Config{Poller: p})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg := &transport.Config{Device: transporttest.Device}
	a, b := transporttest.Connect(t, l, cfg)
	if _, err := transport.Dial(t.Context(), l.Addr().String(), cfg); !errors.Is(err, transport.ErrRefused) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("a second connection: %v", err)
	}
	a.Close()
	b.Close()
	a, b = transporttest.Connect(t, l, cfg)
	a.Send(t.Context(), []byte("x"))
	recvEqual(t, b, []byte("x"))
	if err := p.Close(); err == nil {
		t.Error("a poller with connections was closed")
	}
	a.Close()
	b.Close()
	testutil.Eventually(t, "the end", func() bool { return b.Err() != nil })
}
