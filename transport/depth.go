package transport

// RecvDepth is the number of messages that the peer may have on the way or undelivered here, as Config.RecvDepth has it:
// whoever takes messages (Message.Take) keeps some of them back for the rest of the traffic.
func (c *Conn) RecvDepth() int { return c.cfg.RecvDepth }
